"""The studio's page in a browser: what a user does there."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from gradio_client import Client, handle_file
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

from rite_diffusion.api.demo import example_photos
from studio_server import Served, pocket_adapter, wait_for_state

CHROMIUM = shutil.which("chromium")
NO_CHROMIUM = "Debian's chromium is not installed: apt-get install chromium"
IN_A_BROWSER = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason=NO_CHROMIUM)]
WIDE, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
TABS = ("Generate", "Train", "Fuse", "Compare", "Library")
# A folder for pictures of the page, such as docs/images. What is shown there is trained longer.
PICTURES = os.environ.get("RITE_SCREENSHOTS")
LEFT = "a <unicorn> on the left on a green background"
RIGHT = "a cat on the right on a green background"
STEPS = 120 if PICTURES else 20
DENOISING_STEPS = 25 if PICTURES else 4  # of a picture
MARKUP = "<img src=x onerror=\"document.title='broken'\"> ${document.title='broken'} {{value}}"


@contextmanager
def opened_browser() -> Iterator[Browser]:
    """Chromium, which waits long for what is expected: the machine may be busy."""
    expect.set_options(timeout=60_000)  # what may take how long is tested apart
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@contextmanager
def sessions(browser: Browser, url: str) -> Iterator[Callable[..., Page]]:
    """A function that opens the page in a fresh session."""
    contexts = []

    def open_page(size=WIDE, scheme="light") -> Page:
        context = browser.new_context(viewport=size, color_scheme=scheme, accept_downloads=True)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.goto(url)
        expect(page.locator("#generate")).to_be_visible()
        return page

    yield open_page
    for context in contexts:
        context.close()


def second_adapter(served: Served, folder: Path) -> str:
    """The name of an adapter that is now in the library; trained only if pictures are wanted."""
    client = Client(served.url, verbose=False)
    if not PICTURES:
        file = pocket_adapter(folder / "unicorn.safetensors", "<unicorn>", 5)
        return client.predict(file=handle_file(str(file)), api_name="/import_adapter")
    photos = [handle_file(str(path)) for path in sorted(example_photos("unicorn").iterdir())]
    settings = f"steps={STEPS}\nprior.weight=0\nbatch=4\npreviews.every=40\ncheckpoints.every=40"
    run = client.predict(
        photos=photos, trigger="<unicorn>", class_noun="unicorn", settings=settings,
        api_name="/train",
    )  # fmt: skip
    wait_for_state(served.workspace / "runs" / run, "finished")
    return run


def tab(page: Page, name: str) -> None:
    page.get_by_role("tab", name=name, exact=True).click()


def picture_of(page: Page, name: str, tmp_path: Path) -> None:
    """A picture of the whole page, in few colours."""
    page.wait_for_timeout(600)
    path = Path(PICTURES or tmp_path) / f"studio_{name}.png"
    page.screenshot(path=path, full_page=True)
    with Image.open(path) as image:
        few = image.convert("RGB").quantize(200, dither=Image.Dither.NONE)
    few.save(path, optimize=True)


def fits(page: Page) -> bool:
    """Whether nothing makes the page wider than its window."""
    return page.evaluate("document.documentElement.scrollWidth <= window.innerWidth + 1")


def choose(page: Page, label: str, *options: str) -> None:
    """Take options of a list of the open tab."""
    box = page.get_by_label(label, exact=True).locator("visible=true").first
    for option in options:
        box.click()
        page.get_by_role("option", name=option, exact=True).first.click()
        page.keyboard.press("Escape")
        box.blur()


def set_number(page: Page, label: str, value: int) -> None:
    """Fill a number's field of the open tab, or the field beside a slider."""
    plain = page.get_by_label(label, exact=True)
    beside = page.get_by_label(f"number input for {label}", exact=True)
    plain.or_(beside).locator("visible=true").first.fill(str(value))
    page.keyboard.press("Tab")


def fill_steps(page: Page) -> None:
    """Fill the Generate tab's number of denoising steps, which by default is the base's 25."""
    if not PICTURES:
        page.locator("#denoising-steps input").fill(str(DENOISING_STEPS))


def drawn(served: Served) -> list[Path]:
    """All pictures of the workspace, oldest first."""
    return sorted((served.workspace / "outputs").glob("*.png"))


def start_training(
    page: Page, photos: Path, name: str, fields: dict[str, int], lines: str, trigger: str = ""
):
    """Drop photos, fill what is needed and these fields, leave the others empty, and start."""
    tab(page, "Train")
    files = [str(path) for path in sorted(photos.iterdir())]
    page.locator("#drop-photos input[type=file]").set_input_files(files)
    pictures = [file for file in files if not file.endswith(".txt")]
    expect(page.locator("#thumbnails img")).to_have_count(len(pictures))
    page.locator("#trigger textarea, #trigger input").fill(trigger or f"<{name}>")
    page.locator("#class-noun textarea, #class-noun input").fill(name)
    page.locator("#advanced").get_by_text("Advanced settings").click()
    for field, value in fields.items():
        page.locator(f"#{field} textarea, #{field} input").fill(str(value))
    page.get_by_label("Other settings, one a line").fill(lines)
    page.locator("#start").click()


def drag(page: Page, start: tuple[float, float], stop: tuple[float, float]) -> None:
    """Draw a box on the canvas, from corner to corner in fractions of it."""
    canvas = page.locator("#canvas .pad")
    pad = canvas.bounding_box()
    canvas.hover(position={"x": start[0] * pad["width"], "y": start[1] * pad["height"]})
    pad = canvas.bounding_box()  # again: hovering waited until the page had stopped moving
    (x, y), (to_x, to_y) = (
        (pad["x"] + across * pad["width"], pad["y"] + down * pad["height"])
        for across, down in (start, stop)
    )
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move((x + to_x) / 2, (y + to_y) / 2)
    page.mouse.move(to_x, to_y)
    page.mouse.up()
    expect(page.locator("#canvas .box.picked")).to_have_count(1)
    page.wait_for_timeout(300)
