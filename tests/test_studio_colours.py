"""Colours of the page, measured where they are shown, in light and in dark."""

import json

import pytest
from playwright.sync_api import Page, expect

from studio_page import IN_A_BROWSER, picture_of, tab

pytestmark = IN_A_BROWSER
# (text, colour, opaque background below it) of a chart's words, as they are rendered.
WORDS_JS = """() => [...document.querySelectorAll('#loss svg text, #rate svg text')]
  .filter((node) => node.textContent.trim())
  .map((node) => {
    let below = node;
    const ground = (each) => getComputedStyle(each).backgroundColor;
    while (below.parentElement && ground(below).endsWith(', 0)')) below = below.parentElement;
    return [node.textContent, getComputedStyle(node).fill, ground(below)];
  })"""


def luminance(colour: str) -> float:
    """Relative luminance of `rgb(r, g, b)` (WCAG 2.2)."""
    channels = [int(part) / 255 for part in colour.split("(")[1].split(")")[0].split(",")[:3]]
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(one: str, other: str) -> float:
    """Contrast ratio of two colours (WCAG 2.2)."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.fixture
def measured_run(served):
    """A finished run with a loss and a rate for each of its steps."""
    run = served.workspace / "runs/measured"
    run.mkdir(parents=True)
    rows = [
        {"step": step, "loss": 1 / step, "rate": 1e-3, "images_per_second": 1.0}
        for step in range(1, 30)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "status.json").write_text(json.dumps({"state": "finished", "total": 29}))
    yield run
    for path in run.iterdir():
        path.unlink()
    run.rmdir()


def chart_words(page: Page) -> dict[str, float]:
    """Contrast of each word of the charts."""
    return {text: contrast(ink, ground) for text, ink, ground in page.evaluate(WORDS_JS)}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_charts_stay_readable_when_the_theme_changes(view, measured_run, scheme, tmp_path):
    page = view(scheme=scheme)
    tab(page, "Train")
    expect(page.locator("#rate svg text").first).to_be_visible()
    for press in (False, True, True):
        if press:
            page.locator("#dark").click()
        page.wait_for_timeout(300)
        words = chart_words(page)
        assert {"Loss", "Learning rate", "smoothed", "step"} <= set(words)
        faint = {text: round(ratio, 2) for text, ratio in words.items() if ratio < 4.5}
        assert not faint
        if press:
            picture_of(page, f"chart_{scheme}", tmp_path)
