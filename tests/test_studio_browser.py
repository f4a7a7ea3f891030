"""The studio in a real browser: what a user does from the first photo to the saved picture."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

from rite_diffusion.generation.metadata import read_parameters
from rite_diffusion.ui.jobs import state_of
from studio_server import ENDLESS, end, step_of, studio, wait_for, wait_for_state

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="Debian's chromium is not installed: apt-get install chromium"
)
WIDE, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
# Where pictures of the page are put; docs/images/ takes some of them.
PICTURES = os.environ.get("RITE_SCREENSHOTS")
MARKUP = "<img src=x onerror=\"document.title='broken'\"> ${document.title='broken'} {{value}}"


@pytest.fixture(scope="module")
def browser():
    expect.set_options(timeout=60_000)  # of a busy machine; what may take how long is tested apart
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("browser") / "space"


@pytest.fixture(scope="module")
def server(workspace):
    with studio(workspace) as page:
        yield page


@pytest.fixture
def view(browser, server):
    """A function that opens the page in a fresh session."""
    contexts = []

    def open_page(size=WIDE, scheme="light") -> Page:
        context = browser.new_context(viewport=size, color_scheme=scheme, accept_downloads=True)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.goto(server.local_url)
        expect(page.locator("#generate")).to_be_visible()
        return page

    yield open_page
    for context in contexts:
        context.close()


def tab(page: Page, name: str) -> None:
    page.get_by_role("tab", name=name, exact=True).click()


def picture_of(page: Page, name: str, tmp_path: Path) -> Path:
    """A picture of the whole page."""
    page.wait_for_timeout(600)
    path = Path(PICTURES or tmp_path) / f"studio_{name}.png"
    page.screenshot(path=path, full_page=True)
    return path


def fits(page: Page) -> bool:
    """Whether nothing makes the page wider than its window."""
    return page.evaluate("document.documentElement.scrollWidth <= window.innerWidth + 1")


def choose(page: Page, label: str, option: str) -> None:
    """Take an option of an open tab's list."""
    box = page.get_by_label(label, exact=True).locator("visible=true").first
    box.click()
    page.get_by_role("option", name=option, exact=True).first.click()
    page.keyboard.press("Escape")


def start_training(page: Page, photos: Path, name: str, steps: int) -> None:
    tab(page, "Train")
    files = [str(path) for path in sorted(photos.iterdir())]
    page.locator("#drop-photos input[type=file]").set_input_files(files)
    expect(page.locator("#thumbnails img")).to_have_count(3)
    page.locator("#trigger textarea, #trigger input").fill(f"<{name}>")
    page.locator("#class-noun textarea, #class-noun input").fill(name)
    page.locator("#advanced").get_by_text("Advanced settings").click()
    page.locator("#steps input").fill(str(steps))
    page.get_by_label("Other settings, one a line").fill(
        "prior.weight = 0\nbatch = 2\n"
        "previews.every = 10\npreviews.steps = 4\ncheckpoints.every = 10"
    )
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
from rite_diffusion.cli import main
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
    empty = seconds_until_usable(browser, EMPTY_PAGE, unused_port, tmp_path)
    ours = seconds_until_usable(browser, STUDIO, unused_port, tmp_path)
    print(f"usable after {ours:.1f} s, an empty page of Gradio after {empty:.1f} s")
    assert ours < max(5, 1.5 * empty)  # where the machine is busy with other things


def test_photos_to_adapter_to_picture_and_back_to_its_settings(view, photos, workspace, tmp_path):
    page = view()
    picture_of(page, "empty", tmp_path)
    start_training(page, photos, "toy", 20)
    run = workspace / "runs/toy"
    wait_for(lambda: run.exists(), "the run folder")
    expect(page.locator("#status")).to_contain_text("toy")
    wait_for_state(run, "finished")
    expect(page.locator("#status .state")).to_have_text("finished")
    expect(page.locator("#status")).to_contain_text("step 20 of 20")
    expect(page.locator("#loss canvas, #loss svg").first).to_be_visible()
    expect(page.locator("#previews img")).to_have_count(4)
    picture_of(page, "train", tmp_path)

    tab(page, "Generate")
    choose(page, "Adapters", "toy")
    expect(page.get_by_label("Weight of toy").first).to_be_visible()
    page.locator("#chips").get_by_text("<toy>").click()
    expect(page.locator("#prompt textarea")).to_have_value("<toy> ")
    page.locator("#prompt textarea").fill("a <toy> on a blue background")
    page.keyboard.press("Enter")
    expect(page.locator("#made img")).to_have_count(4)
    made = sorted((workspace / "outputs").glob("*.png"))
    facts = read_parameters(made[-1])
    assert facts.prompt == "a <toy> on a blue background" and facts.adapters[0]["weight"] == 1
    picture_of(page, "generate", tmp_path)

    fresh = view()
    fresh.locator("#restore input[type=file]").set_input_files(str(made[-1]))
    expect(fresh.locator("#prompt textarea")).to_have_value(facts.prompt)
    expect(fresh.get_by_label("Weight of toy").first).to_be_visible()
    fresh.locator("#generate").click()
    expect(fresh.locator("#made img")).to_have_count(1)
    again = max((workspace / "outputs").glob("*.png"))
    assert Image.open(again).tobytes() == Image.open(made[-1]).tobytes()

    tab(fresh, "Library")
    fresh.locator("#cards button").first.click()
    expect(fresh.locator("#card")).to_contain_text("<toy>")
    picture_of(fresh, "library", tmp_path)
    with fresh.expect_download() as download:
        fresh.locator("#download").click()
    assert Path(download.value.path()).read_bytes() == (run / "adapter.safetensors").read_bytes()


def test_a_training_goes_on_without_its_page_stops_and_resumes(view, photos, workspace):
    page = view()
    start_training(page, photos, "ball", 100_000)
    run = workspace / "runs/ball"
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


def test_markup_is_text_everywhere(view, workspace, tmp_path):
    page = view()
    page.locator("#prompt textarea").fill(MARKUP)
    page.get_by_label("Pictures", exact=True).locator("visible=true").first.fill("1")
    page.keyboard.press("Tab")
    page.locator("#generate").click()
    expect(page.locator("#made img")).to_have_count(1)
    page.locator("#made button img").first.click()
    expect(page.locator("#facts")).to_contain_text("onerror")
    assert page.locator("#facts img").count() == 0
    assert read_parameters(max((workspace / "outputs").glob("*.png"))).prompt == MARKUP
    page.locator("#restore input[type=file]").set_input_files(str(_foreign(tmp_path)))
    expect(page.get_by_text("does not tell how it was made")).to_be_visible()
    assert page.title() == "rite studio"


def _foreign(folder: Path) -> Path:
    path = folder / "foreign.png"
    Image.new("RGB", (8, 8)).save(path)
    return path


def test_generating_can_be_stopped(view, workspace):
    page = view()
    before = len(list((workspace / "outputs").glob("*.png")))
    page.locator("#prompt textarea").fill("a cat")
    page.get_by_label("Pictures", exact=True).locator("visible=true").first.fill("16")
    page.keyboard.press("Tab")
    page.locator("#generate").click()
    expect(page.locator("#stage img")).to_be_visible()
    page.locator("#stop").click()
    expect(page.locator("#stage .bar")).to_have_count(0)
    count = len(list((workspace / "outputs").glob("*.png")))
    page.wait_for_timeout(3000)
    assert len(list((workspace / "outputs").glob("*.png"))) <= count + 1 < before + 16


@pytest.mark.parametrize(("size", "scheme"), [(WIDE, "dark"), (PHONE, "light"), (PHONE, "dark")])
def test_every_tab_fits_a_phone_and_a_laptop(view, size, scheme, tmp_path):
    page = view(size, scheme)
    for name in ("Generate", "Train", "Library"):
        tab(page, name)
        page.wait_for_timeout(300)
        assert fits(page), name
        width = "phone" if size is PHONE else "wide"
        picture_of(page, f"{name.lower()}_{width}_{scheme}", tmp_path)
    assert ("dark" in page.locator("body").get_attribute("class")) == (scheme == "dark")


def test_no_request_leaves_this_machine(browser, server):
    context = browser.new_context()
    asked = []
    context.on("request", lambda request: asked.append(request.url))
    page = context.new_page()
    page.goto(server.local_url)
    expect(page.locator("#generate")).to_be_visible()
    page.wait_for_timeout(1000)
    context.close()
    outside = [url for url in asked if not url.startswith((server.local_url, "data:", "blob:"))]
    assert outside == []


def test_a_studio_that_ends_leaves_its_training_at_work(photos, tmp_path):
    with studio(tmp_path / "space") as page:
        from gradio_client import Client, handle_file

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
