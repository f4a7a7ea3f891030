"""The studio in a real browser: what a user does from the first photo to the fused adapter."""

import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from gradio_client import Client, handle_file
from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

from rite_diffusion.adapters import load_adapter
from rite_diffusion.api.demo import example_photos
from rite_diffusion.generation.metadata import read_parameters
from rite_diffusion.studio.jobs import state_of
from studio_server import (
    ENDLESS,
    SHORT,
    Served,
    end,
    pocket_adapter,
    step_of,
    studio,
    wait_for,
    wait_for_state,
)

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="Debian's chromium is not installed: apt-get install chromium"
)
WIDE, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
TABS = ("Generate", "Train", "Fuse", "Compare", "Library")
# A folder for pictures of the page, such as docs/images. What is shown there is trained longer.
PICTURES = os.environ.get("RITE_SCREENSHOTS")
LEFT = "a <unicorn> on the left on a green background"
RIGHT = "a cat on the right on a green background"
STEPS = 120 if PICTURES else 20
MARKUP = "<img src=x onerror=\"document.title='broken'\"> ${document.title='broken'} {{value}}"


@pytest.fixture(scope="module")
def browser():
    expect.set_options(timeout=60_000)  # of a busy machine; what may take how long is tested apart
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def second(served, tmp_path_factory) -> str:
    """An adapter of the library beside the one that the walk trains."""
    client = Client(served.url, verbose=False)
    if not PICTURES:
        file = pocket_adapter(
            tmp_path_factory.mktemp("second") / "unicorn.safetensors", "<unicorn>", 5
        )
        return client.predict(file=handle_file(str(file)), api_name="/import_adapter")
    photos = [handle_file(str(path)) for path in sorted(example_photos("unicorn").iterdir())]
    settings = f"steps={STEPS}\nprior.weight=0\nbatch=4\npreviews.every=40\ncheckpoints.every=40"
    run = client.predict(
        photos=photos, trigger="<unicorn>", class_noun="unicorn", settings=settings,
        api_name="/train",
    )  # fmt: skip
    wait_for_state(served.workspace / "runs" / run, "finished")
    return run


@pytest.fixture
def view(browser, served):
    """A function that opens the page in a fresh session."""
    contexts = []

    def open_page(size=WIDE, scheme="light") -> Page:
        context = browser.new_context(viewport=size, color_scheme=scheme, accept_downloads=True)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.goto(served.url)
        expect(page.locator("#generate")).to_be_visible()
        return page

    yield open_page
    for context in contexts:
        context.close()


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


def drawn(served: Served) -> list[Path]:
    """All pictures of the workspace, oldest first."""
    return sorted((served.workspace / "outputs").glob("*.png"))


def start_training(page: Page, photos: Path, name: str, fields: dict[str, int], lines: str):
    """Drop photos, fill what is needed and these fields, leave the others empty, and start."""
    tab(page, "Train")
    files = [str(path) for path in sorted(photos.iterdir())]
    page.locator("#drop-photos input[type=file]").set_input_files(files)
    pictures = [file for file in files if not file.endswith(".txt")]
    expect(page.locator("#thumbnails img")).to_have_count(len(pictures))
    page.locator("#trigger textarea, #trigger input").fill(f"<{name}>")
    page.locator("#class-noun textarea, #class-noun input").fill(name)
    page.locator("#advanced").get_by_text("Advanced settings").click()
    for field, value in fields.items():
        page.locator(f"#{field} textarea, #{field} input").fill(str(value))
    page.get_by_label("Other settings, one a line").fill(lines)
    page.locator("#start").click()


EMPTY_PAGE = """
import gradio as gr
with gr.Blocks() as page:
    with gr.Tab("Train"):
        gr.Textbox(elem_id="prompt")
        gr.Button(elem_id="start")
page.launch(server_port=PORT, prevent_thread_lock=True, quiet=True, ssr_mode=False)
print("up", flush=True)
page.block_thread()
"""
STUDIO = """
import sys
from rite_diffusion.cli.app import main
sys.argv[1:] = ["studio", "--port", "PORT", "--workspace", "WORKSPACE"]
main()
"""


def seconds_until_usable(browser, code: str, port: int, folder: Path) -> float:
    """From the start of a process to a page whose fields and tabs answer."""
    code = code.replace("PORT", str(port)).replace("WORKSPACE", str(folder / "space"))
    page = browser.new_page()
    page.set_default_timeout(60_000)
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=folder)
    try:
        assert process.stdout.readline()
        page.goto(f"http://127.0.0.1:{port}")
        page.locator("#prompt textarea").fill("a cat")
        page.get_by_role("tab", name="Train", exact=True).click()
        expect(page.locator("#start")).to_be_visible()
        return time.monotonic() - start
    finally:
        page.close()
        process.terminate()
        process.communicate()


def test_the_page_can_be_used_five_seconds_after_the_command(browser, unused_port, tmp_path):
    commands = (STUDIO, EMPTY_PAGE)
    best = [math.inf, math.inf]
    for _ in range(3):  # on a machine that is busy with other things, the least says most
        for index, command in enumerate(commands):
            seconds = seconds_until_usable(browser, command, unused_port, tmp_path)
            best[index] = min(best[index], seconds)
        ours, empty = best
        print(f"usable after {ours:.1f} s, an empty page of Gradio after {empty:.1f} s")
        if ours < max(5, 2 * empty):
            return
    pytest.fail(f"usable after {ours:.1f} s, an empty page of Gradio after {empty:.1f} s")


def test_the_whole_way_from_photos_to_a_fused_adapter(view, served, second, tmp_path):
    page = view()
    train_the_robot(page, served, tmp_path)
    page.locator("#run-use").click()  # goes on to Generate, with the adapter chosen
    expect(page.get_by_label("Weight of robot").first).to_be_visible()
    page.locator("#chips").get_by_text("<robot>").click()
    expect(page.locator("#prompt textarea")).to_have_value("<robot> ")
    page.locator("#prompt textarea").fill("a <robot> on a blue background")
    page.keyboard.press("Enter")
    expect(page.locator("#made img")).to_have_count(4)
    facts = read_parameters(drawn(served)[-1])
    assert facts.prompt == "a <robot> on a blue background" and facts.adapters[0].weight == 1
    page.locator("#made button img").first.click()
    expect(page.locator("#facts")).to_contain_text("robot at 1")
    page.keyboard.press("Escape")
    picture_of(page, "generate", tmp_path)
    fuse_two(page, served, second, tmp_path)
    take_it_away_and_back(page, tmp_path)


def train_the_robot(page: Page, served: Served, tmp_path: Path) -> None:
    every = STEPS // 2
    start_training(
        page, example_photos("robot"), "robot",
        {"steps": STEPS, "batch": 4 if PICTURES else 2, "every": every},
        f"prior.weight = 0\npreviews.steps = {25 if PICTURES else 4}\ncheckpoints.every = {every}",
    )  # fmt: skip
    run = served.workspace / "runs/robot"
    wait_for(lambda: run.exists(), "the run folder")
    expect(page.locator("#status")).to_contain_text("robot")
    wait_for_state(run, "finished")
    assert load_adapter(run / "adapter.safetensors").ranks() == [16]  # what was left empty
    expect(page.locator("#status .state")).to_have_text("finished")
    expect(page.locator("#status")).to_contain_text(f"step {STEPS} of {STEPS}")
    expect(page.locator("#loss canvas, #loss svg").first).to_be_visible()
    expect(page.locator("#previews img").first).to_be_visible()
    picture_of(page, "train", tmp_path)


def fuse_two(page: Page, served: Served, second: str, tmp_path: Path) -> None:
    """See what interferes, fuse, compare, save."""
    tab(page, "Fuse")
    choose(page, "Adapters", "robot", second)
    page.locator("#conflicts").click()
    expect(page.locator("#conflict-report")).to_contain_text("Crosstalk", timeout=240_000)
    assert list(served.workspace.glob("drafts/*")) == []  # nothing is fused yet
    page.locator("#fuse").click()
    expect(page.locator("#keep-fused")).to_be_visible()
    expect(page.locator("#sides img")).to_have_count(6)  # three prompts, before and after
    picture_of(page, "fuse", tmp_path)
    page.locator("#fused-name textarea, #fused-name input").fill("together")
    page.locator("#keep-fused").click()
    fused = served.workspace / "adapters/together.safetensors"
    wait_for(lambda: fused.exists(), "the fused adapter")


def take_it_away_and_back(page: Page, tmp_path: Path) -> None:
    """Download, convert, delete, undo."""
    tab(page, "Library")
    page.locator("#cards button").first.click()
    expect(page.locator("#card")).to_contain_text("<robot>, <unicorn>")
    picture_of(page, "library", tmp_path)
    with page.expect_download() as download:
        page.locator("#download").click()
    assert download.value.suggested_filename == "together.safetensors"
    download.value.save_as(tmp_path / "down.safetensors")
    assert load_adapter(tmp_path / "down.safetensors").info.triggers() == ["<robot>", "<unicorn>"]
    page.locator("#convert-fold").get_by_text("For another program").click()
    page.locator("#convert").click()
    expect(page.locator("#proof")).to_contain_text("together-kohya.safetensors")
    with page.expect_download() as download:
        page.locator("#converted").click()
    download.value.save_as(tmp_path / "converted.safetensors")
    assert load_adapter(tmp_path / "converted.safetensors").pairs
    page.locator("#delete").click()
    page.get_by_role("button", name="Undo the deletion of together").click()
    expect(page.locator("#cards").get_by_text("together")).to_be_visible()


def test_a_dropped_picture_brings_its_settings_and_its_pixels_back(view, served, second):
    client = Client(served.url, verbose=False)
    wanted = {"prompt": "a <unicorn>", "negative": "red", "seed": 12, "steps": 3, "guidance": 2.5}
    client.predict(**wanted, adapters=[f"{second}:0.7"], api_name="/generate")
    made = drawn(served)[-1]
    page = view()
    page.locator("#restore input[type=file]").set_input_files(str(made))
    expect(page.locator("#prompt textarea")).to_have_value("a <unicorn>")
    expect(page.get_by_label(f"Weight of {second}").first).to_be_visible()
    page.locator("#generate").click()
    expect(page.locator("#made img")).to_have_count(1)
    again = drawn(served)[-1]
    assert again != made and read_parameters(again) == read_parameters(made)
    assert Image.open(again).tobytes() == Image.open(made).tobytes()


def test_a_page_that_nobody_touches_asks_for_little(view, second):
    page = view()
    choose(page, "Adapters", second)
    expect(page.get_by_label(f"Weight of {second}").first).to_be_visible()
    page.wait_for_timeout(1000)
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.wait_for_timeout(3000)
    assert len(asked) <= 12  # the runs' timer, and nothing that answers itself


def test_boxes_are_drawn_filled_drawn_with_and_restored(view, served, second, tmp_path):
    page = view()
    choose(page, "Adapters", second)
    page.locator("#regions").get_by_text("Regions").click()
    drag(page, (0.04, 0.1), (0.5, 0.96))
    page.locator("#box-prompt textarea").fill(LEFT)
    choose(page, "Adapter in this box", second)
    drag(page, (0.55, 0.2), (0.96, 0.96))
    expect(page.locator("#canvas .box")).to_have_count(2)
    expect(page.locator("#box-prompt textarea")).to_have_value("")
    page.locator("#box-prompt textarea").fill(RIGHT)
    page.locator("#canvas .box").first.click()  # picks the first again
    expect(page.locator("#box-prompt textarea")).to_have_value(LEFT)
    page.locator("#prompt textarea").fill("a green background")
    set_number(page, "Pictures", 4 if PICTURES else 1)
    page.locator("#generate").click()
    expect(page.locator("#made img").first).to_be_visible()
    expect(page.locator("#stage .bar")).to_have_count(0)
    picture_of(page, "regions", tmp_path)
    made = drawn(served)[-1]
    left, right = read_parameters(made).regions
    assert left.endswith(f": {LEFT} ::  :: 1") and right.endswith(f": {RIGHT}")
    assert [round(float(side), 1) for side in left.split(":")[0].split(",")] == [0, 0.1, 0.5, 1]
    fresh = view()
    fresh.locator("#restore input[type=file]").set_input_files(str(made))
    expect(fresh.locator("#canvas .box")).to_have_count(2)
    expect(fresh.locator("#box-prompt textarea")).to_have_value(LEFT)
    fresh.locator("#generate").click()
    expect(fresh.locator("#made img")).to_have_count(1)
    assert Image.open(drawn(served)[-1]).tobytes() == Image.open(made).tobytes()


def drag(page: Page, start: tuple[float, float], stop: tuple[float, float]) -> None:
    """Draw a box on the canvas, from corner to corner in fractions of it."""
    page.locator("#canvas .pad").scroll_into_view_if_needed()
    pad = page.locator("#canvas .pad").bounding_box()
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


def test_a_sheet_is_drawn_and_shown(view, served, second, tmp_path):
    page = view()
    tab(page, "Compare")
    prompts = "a <unicorn> on a blue background\na <unicorn> on a red background"
    page.locator("#sheet-prompts textarea").fill(prompts)
    choose(page, "Adapters", second)
    page.locator("#sheet-seeds textarea, #sheet-seeds input").fill("0, 1" if PICTURES else "0")
    page.locator("#sheet-steps input").fill("" if PICTURES else "1")
    page.locator("#compare").click()
    expect(page.locator("#sheet img")).to_be_visible()
    picture_of(page, "compare", tmp_path)
    sheets = list((served.workspace / "sheets").glob("*.png"))
    assert any("a <unicorn> on a red" in Image.open(each).text["rite_grid"] for each in sheets)


def test_the_first_picture_shows_soon_after_the_click(view):
    page = view()
    page.locator("#prompt textarea").fill("a cat on a blue background")
    set_number(page, "Pictures", 1)
    waits = []
    for _ in range(2):  # the first opens the base, if nothing has yet
        start = time.monotonic()
        page.locator("#generate").click()
        expect(page.locator("#stage img")).to_be_visible()
        waits.append(time.monotonic() - start)
        expect(page.locator("#stage .bar")).to_have_count(0)
        expect(page.locator("#made img")).to_have_count(1)
    print(f"first picture after {waits[0]:.1f} s, then after {waits[1]:.1f} s")
    assert waits[1] < 5 * max(1, os.getloadavg()[0] / os.cpu_count())  # busy with other things


def test_a_training_goes_on_without_its_page_stops_and_resumes(view, photos, served):
    page = view()
    start_training(page, photos, "ball", {"steps": 100_000}, SHORT.replace("steps = 4\n", ""))
    run = served.workspace / "runs/ball"
    try:
        wait_for(lambda: step_of(run) > 2, "some steps")
        page.close()
        seen = step_of(run)
        wait_for(lambda: step_of(run) > seen + 2, "steps without a page")
        page = view()
        tab(page, "Train")
        expect(page.locator("#status")).to_contain_text("ball")
        expect(page.locator("#status .state")).to_have_text("running")
        page.locator("#run-stop").click()
        wait_for_state(run, "stopped")
        expect(page.locator("#status .state")).to_have_text("stopped")
        before = step_of(run)
        page.locator("#run-resume").click()
        wait_for(lambda: step_of(run) > before, "steps after the resume")
        expect(page.locator("#status .state")).to_have_text("running")
        page.locator("#run-stop").click()
        wait_for_state(run, "stopped")
    finally:
        end(run)


def test_markup_is_text_everywhere(view, served, tmp_path):
    page = view()
    page.locator("#prompt textarea").fill(MARKUP)
    set_number(page, "Pictures", 1)
    page.locator("#generate").click()
    expect(page.locator("#made img")).to_have_count(1)
    page.locator("#made button img").first.click()
    expect(page.locator("#facts")).to_contain_text("onerror")
    assert page.locator("#facts img").count() == 0
    assert read_parameters(drawn(served)[-1]).prompt == MARKUP
    page.locator("#restore input[type=file]").set_input_files(str(_foreign(tmp_path)))
    expect(page.get_by_text("does not tell how it was made")).to_be_visible()
    assert page.title() == "rite studio"


def _foreign(folder: Path) -> Path:
    path = folder / "foreign.png"
    Image.new("RGB", (8, 8)).save(path)
    return path


def test_generating_can_be_stopped(view, served):
    page = view()
    before = len(drawn(served))
    page.locator("#prompt textarea").fill("a cat")
    set_number(page, "Pictures", 16)
    page.locator("#generate").click()
    expect(page.locator("#stage img")).to_be_visible()
    page.locator("#stop").click()
    expect(page.locator("#stage .bar")).to_have_count(0)
    count = len(drawn(served))
    page.wait_for_timeout(3000)
    assert len(drawn(served)) <= count + 1 < before + 16


@pytest.mark.parametrize(("size", "scheme"), [(WIDE, "dark"), (PHONE, "light"), (PHONE, "dark")])
def test_every_tab_fits_a_phone_and_a_laptop(view, size, scheme, tmp_path):
    page = view(size, scheme)
    for name in TABS:
        tab(page, name)
        page.wait_for_timeout(300)
        assert fits(page), name
        width = "phone" if size is PHONE else "wide"
        picture_of(page, f"{name.lower()}_{width}_{scheme}", tmp_path)
    dark = page.evaluate("document.body.classList.contains('dark')")
    assert dark == (scheme == "dark")


def test_the_choice_of_light_or_dark_outlives_the_page(view):
    page = view()
    page.locator("#dark").click()
    page.reload()
    expect(page.locator("#generate")).to_be_visible()
    page.wait_for_function("document.body.classList.contains('dark')")


def test_no_request_leaves_this_machine(browser, served):
    context = browser.new_context()
    asked = []
    context.on("request", lambda request: asked.append(request.url))
    page = context.new_page()
    page.goto(served.url)
    expect(page.locator("#generate")).to_be_visible()
    for name in TABS:
        tab(page, name)
        page.wait_for_timeout(300)
    context.close()
    outside = [url for url in asked if not url.startswith((served.url, "data:", "blob:"))]
    assert outside == []


def test_a_studio_that_ends_leaves_its_training_at_work(photos, tmp_path):
    with studio(tmp_path / "space") as page:
        files = [handle_file(str(path)) for path in sorted(photos.glob("*.png"))]
        run_name = Client(page.local_url, verbose=False).predict(
            photos=files, trigger="<t>", class_noun="toy", settings=ENDLESS,
            api_name="/train",
        )  # fmt: skip
        run = tmp_path / "space/runs" / run_name
        wait_for(lambda: step_of(run) > 1, "some steps")
        page.close()
        seen = step_of(run)
        wait_for(lambda: step_of(run) > seen + 1, "steps without a studio")
        assert state_of(run) == "running"
