"""The studio in a real browser: what a user does from the first photo to the fused adapter."""

from pathlib import Path

import pytest
from gradio_client import Client, handle_file
from PIL import Image
from playwright.sync_api import Page, expect

from rite_diffusion.adapters import load_adapter
from rite_diffusion.api.demo import example_photos
from rite_diffusion.generation.metadata import read_parameters
from rite_diffusion.studio.jobs import state_of
from rite_diffusion.studio.tabs import fuse
from studio_page import (
    DENOISING_STEPS,
    IN_A_BROWSER,
    LEFT,
    MARKUP,
    PICTURES,
    RIGHT,
    STEPS,
    choose,
    drag,
    drawn,
    fill_steps,
    picture_of,
    set_number,
    start_training,
    tab,
)
from studio_server import (
    ENDLESS,
    SHORT,
    Served,
    end,
    step_of,
    studio,
    wait_for,
    wait_for_state,
)

pytestmark = [*IN_A_BROWSER, pytest.mark.usefixtures("quick_statistics")]


@pytest.mark.slow  # half a minute
def test_a_user_trains_generates_fuses_and_exports_in_the_page(
    view, served, second, tmp_path, monkeypatch
):
    monkeypatch.setattr(fuse, "STEPS", DENOISING_STEPS)
    page = view()
    train_the_robot(page, served, tmp_path)
    page.locator("#run-use").click()  # goes on to Generate, with the adapter chosen
    expect(page.get_by_label("Weight of robot").first).to_be_visible()
    page.locator("#chips").get_by_text("<robot>").click()
    expect(page.locator("#prompt textarea")).to_have_value("<robot> ")
    fill_steps(page)
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
        f"prior.weight = 0\npreviews.steps = {DENOISING_STEPS}\ncheckpoints.every = {every}",
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


def test_dropping_a_picture_restores_settings_that_redraw_it(view, served, second):
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


def test_regions_are_drawn_on_the_canvas_used_and_restored(view, served, second, tmp_path):
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
    fill_steps(page)
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


@pytest.mark.slow  # a training in a process of its own, twice
def test_a_training_continues_without_the_page_and_stops_and_resumes(view, photos, served):
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


def test_markup_in_prompts_is_shown_as_text(view, served, tmp_path):
    page = view()
    fill_steps(page)
    page.locator("#prompt textarea").fill(MARKUP)
    set_number(page, "Pictures", 1)
    page.locator("#generate").click()
    expect(page.locator("#made img")).to_have_count(1)
    page.locator("#made button img").first.click()
    expect(page.locator("#facts")).to_contain_text("onerror")
    assert page.locator("#facts img").count() == 0
    assert read_parameters(drawn(served)[-1]).prompt == MARKUP
    page.locator("#restore input[type=file]").set_input_files(str(_foreign(tmp_path)))
    expect(page.get_by_text("carries no parameters")).to_be_visible()
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


@pytest.mark.slow  # a studio and a training in processes of their own
def test_closing_the_studio_leaves_its_training_running(photos, tmp_path):
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
