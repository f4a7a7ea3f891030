"""Boxes of the Generate tab without a mouse: they are reached, named, moved and sized by keys."""

from playwright.sync_api import Page, expect

from rite_diffusion.generation.metadata import read_parameters
from studio_page import IN_A_BROWSER, drawn, fill_steps, set_number

pytestmark = IN_A_BROWSER


def reach(page: Page, selector: str) -> None:
    """Press Tab until an element has the focus."""
    for _ in range(60):
        if page.evaluate("(it) => document.activeElement.matches(it)", selector):
            return
        page.keyboard.press("Tab")
    raise AssertionError(f"Tab does not reach {selector}")


def press(page: Page, key: str, times: int) -> None:
    for _ in range(times):
        page.keyboard.press(key)


def test_boxes_are_named_moved_and_sized_by_keys(view, served):
    page = view()
    fill_steps(page)
    set_number(page, "Pictures", 1)
    page.locator("#prompt textarea").fill("a green background")
    page.locator("#regions button").first.focus()
    page.keyboard.press("Enter")
    reach(page, "#box-add")
    page.keyboard.press("Enter")
    corners = page.locator("#box-corners textarea, #box-corners input")
    expect(corners).to_have_value("0.25, 0.25, 0.75, 0.75")
    page.keyboard.press("Shift+Tab")
    assert page.evaluate("document.activeElement.matches('#canvas .box')")
    press(page, "ArrowLeft", 5)
    press(page, "ArrowDown", 2)
    expect(corners).to_have_value("0.15, 0.29, 0.65, 0.79")
    press(page, "Shift+ArrowRight", 3)  # the box still has the focus
    press(page, "Shift+ArrowUp", 2)
    expect(corners).to_have_value("0.15, 0.29, 0.71, 0.75")
    press(page, "Shift+ArrowDown", 40)
    expect(corners).to_have_value("0.15, 0.29, 0.71, 1")
    page.keyboard.press("Enter")
    expect(page.locator("#box-prompt textarea")).to_be_focused()
    page.keyboard.type("a red ball")
    box = page.locator("#canvas .box")
    said = "Box 1: a red ball. 15 % from the left, 29 % from the top, 56 % wide, 71 % high"
    expect(box).to_have_attribute("aria-label", said)
    before = len(drawn(served))
    reach(page, "#generate")
    page.keyboard.press("Enter")
    expect(page.locator("#made img")).to_have_count(1)
    assert len(drawn(served)) == before + 1
    assert read_parameters(drawn(served)[-1]).regions == ["0.15,0.29,0.71,1: a red ball"]
