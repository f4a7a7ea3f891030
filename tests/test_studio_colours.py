"""Colours of the page, measured where they are shown, in light and in dark."""

import json

import pytest
from playwright.sync_api import Page, expect

from rite_diffusion.fusion.report import ConflictReport, LayerConflict
from rite_diffusion.studio.conflicts import report_html
from rite_diffusion.studio.jobs import ACTIVE
from studio_page import IN_A_BROWSER, TABS, choose, picture_of, tab

pytestmark = IN_A_BROWSER
# (text, colour, ground) of every visible text and placeholder; both as [red, green, blue], painted
# as the browser does: grounds from the page's to the text's own, then the text in its opacity.
WORDS_JS = """(within) => {
  const canvas = document.createElement('canvas');
  canvas.width = canvas.height = 1;
  const pen = canvas.getContext('2d', { willReadFrequently: true });
  const paint = (colour, opacity = 1) => {
    pen.globalAlpha = opacity;
    pen.fillStyle = colour;
    pen.fillRect(0, 0, 1, 1);
    return [...pen.getImageData(0, 0, 1, 1).data.slice(0, 3)];
  };
  const colours = (node, ink) => {
    const above = [];
    for (let each = node; each; each = each.parentElement) above.unshift(each);
    let opacity = 1, ground = paint('white');
    for (const each of above) {
      const style = getComputedStyle(each);
      opacity *= Number(style.opacity);
      ground = paint(style.backgroundColor, opacity);
    }
    return [paint(ink, opacity), ground];
  };
  const seen = (node) => {
    const frame = node.getBoundingClientRect();
    return frame.width > 1 && frame.height > 1 && !node.closest('[disabled]') &&
      node.checkVisibility({ opacityProperty: true, visibilityProperty: true });
  };
  const found = [];
  const walker = document.createTreeWalker(document.querySelector(within), NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const text = walker.currentNode.textContent.trim(), node = walker.currentNode.parentElement;
    if (!text || !seen(node) || node.closest('script, style, noscript')) continue;
    const style = getComputedStyle(node);
    found.push([text, ...colours(node, node.closest('svg') ? style.fill : style.color)]);
  }
  for (const node of document.querySelectorAll('[placeholder]'))
    if (node.placeholder && !node.value && seen(node) && node.closest(within))
      found.push([node.placeholder,
                  ...colours(node, getComputedStyle(node, '::placeholder').color)]);
  return found;
}"""
LEAST = 4.5  # contrast of text (WCAG 2.2, success criterion 1.4.3)


def luminance(colour: list[int]) -> float:
    """Relative luminance of red, green and blue from 0 to 255 (WCAG 2.2)."""
    channels = [part / 255 for part in colour]
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(one: list[int], other: list[int]) -> float:
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


def faint(page: Page, within: str = "body") -> dict[str, float]:
    """Contrast of the words within an element that have less than LEAST."""
    words = {text: contrast(ink, ground) for text, ink, ground in page.evaluate(WORDS_JS, within)}
    assert words
    return {text: round(ratio, 2) for text, ratio in words.items() if ratio < LEAST}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_word_of_every_tab_can_be_read(view, measured_run, second, scheme, tmp_path):
    page = view(scheme=scheme)
    choose(page, "Adapters", second)
    for fold in page.locator("button.label-wrap:visible").all():
        fold.click()
    page.locator("#columns").click()
    expect(page.locator("#canvas .box")).to_have_count(2)
    found = {}
    for name in TABS:
        tab(page, name)
        page.wait_for_timeout(700)  # colours and folds change gradually
        found |= {f"{name}: {text}": ratio for text, ratio in faint(page).items()}
        picture_of(page, f"words_{name.lower()}_{scheme}", tmp_path)
    assert not found, "\n".join(f"{ratio} {words}" for words, ratio in found.items())


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_states_of_a_run_and_a_conflict_report_can_be_read(view, measured_run, scheme, tmp_path):
    page = view(scheme=scheme)
    tab(page, "Train")
    badge = page.locator("#status .state")
    expect(badge).to_have_text("finished")
    for state in (*ACTIVE, "queued", "stopped", "failed", "finished"):
        badge.evaluate("(node, state) => { node.className = `state ${state}`; }", state)
        assert not faint(page, "#status"), state
    tab(page, "Fuse")
    layer = LayerConflict("lora_unet_mid", [[1, 0.4], [1.2, 1]], [0.9, 0.4], [0.1, 0.2], 1.0, 0.3)
    report = ConflictReport(
        "gram", ["<a>", "<b>"], layer.crosstalk, layer.before, layer.after, 1.0, 0.3, [layer]
    )
    show = "(node, html) => { node.innerHTML = html; node.hidden = false; }"
    page.locator("#fuse-stage").evaluate(
        show, report_html(report).replace("<details", "<details open")
    )
    picture_of(page, f"report_{scheme}", tmp_path)
    assert not faint(page, "#fuse-stage")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_charts_stay_readable_when_the_theme_changes(view, measured_run, scheme, tmp_path):
    page = view(scheme=scheme)
    tab(page, "Train")
    expect(page.locator("#rate svg text").first).to_be_visible()
    for press in (False, True, True):
        if press:
            page.locator("#dark").click()
        page.wait_for_timeout(500)
        for chart, title in (("#loss", "Loss"), ("#rate", "Learning rate")):
            assert title in page.locator(f"{chart} svg text").all_text_contents()
            assert faint(page, f"{chart} svg") == {}
        if press:
            picture_of(page, f"chart_{scheme}", tmp_path)
