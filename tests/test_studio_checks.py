"""What is asked before something is queued, in the page and through the API alike."""

import json
import re

import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image
from playwright.sync_api import expect

from rite_diffusion.studio.jobs import JobRecord, write_job
from studio_page import IN_A_BROWSER, start_training, tab

KNOWN = "is a word that pocket already knows"


@pytest.fixture
def client(served):
    return Client(served.url, verbose=False)


def queued(served) -> set[str]:
    """Names of runs and photo sets."""
    return {path.name for name in ("runs", "photos") for path in served.workspace.glob(f"{name}/*")}


BAD = {
    "a known trigger": ({"trigger": "cat"}, KNOWN),
    "an empty trigger": ({"trigger": " "}, "trigger"),
    "an unreadable photo": ({"photos": ["broken"]}, "no photos among the files: .*broken"),
    "an unknown setting": ({"settings": "optim.lrr = 1"}, "did you mean 'optim.lr'"),
    "a preview's prompt": ({"settings": 'previews.prompts = ["a [b:c:3]"]'}, r"\[b:c:3\]"),
    "a rank": ({"settings": "lora.rank = 1000"}, "rank"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_training_that_would_fail_is_refused_by_the_api(client, served, photos, tmp_path, case):
    changed, words = BAD[case]
    (tmp_path / "broken.png").write_bytes(b"no picture")
    files = [handle_file(str(path)) for path in sorted(photos.iterdir())]
    if "photos" in changed:
        files = [handle_file(str(tmp_path / "broken.png"))]
    before = queued(served)
    wanted = {"trigger": "<new>", "class_noun": "toy", **changed, "photos": files}
    with pytest.raises(AppError, match=f"(?is){words}") as fault:
        client.predict(**wanted, api_name="/train")
    assert str(served.workspace) not in str(fault.value)
    assert queued(served) == before


@pytest.mark.parametrize("prompt", ["", "  "])
def test_an_empty_prompt_is_refused_by_the_api(client, prompt):
    client.predict(prompt="", regions=["0,0,1,1: a cat"], steps=1, api_name="/generate")
    with pytest.raises(AppError, match="Write a prompt first"):
        client.predict(prompt=prompt, api_name="/generate")
    with pytest.raises(AppError, match="Write a prompt first"):
        client.predict(prompts=["a cat", prompt], api_name="/compare")


@pytest.fixture
def refused_run(served):
    """A run that `rite train` refused before its first step."""
    run = served.workspace / "runs/refused"
    run.mkdir(parents=True)
    (run / "output.txt").write_text("rite: trigger 'cat' is a word that pocket already knows.\n")
    write_job(run, JobRecord("run", 1.0, 2**22 - 1, 1.0, "cpu"))
    yield run
    for path in run.iterdir():
        path.unlink()
    run.rmdir()


def test_a_resume_that_would_fail_alike_is_refused(client, refused_run):
    with pytest.raises(AppError, match="would fail in the same way: trigger 'cat'"):
        client.predict(run="refused", api_name="/resume_run")
    (refused_run / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 1}) + "\n")
    client.predict(run="refused", api_name="/resume_run")  # it had begun
    client.predict(run="refused", api_name="/stop_run")


@pytest.mark.browser
class TestInTheBrowser:
    pytestmark = IN_A_BROWSER

    def test_a_known_trigger_is_refused_and_starts_nothing(self, view, served, photos):
        page, before = view(), set(served.workspace.glob("runs/*"))
        start_training(page, photos, "cat", {}, "", trigger="cat")
        expect(page.get_by_text(re.compile(KNOWN)).first).to_be_visible()
        assert set(served.workspace.glob("runs/*")) == before

    def test_a_refused_run_offers_no_resume(self, view, refused_run):
        page = view()
        tab(page, "Train")
        expect(page.locator("#status")).to_contain_text("already knows")
        expect(page.locator("#run-resume")).to_be_hidden()
        write_job(refused_run, JobRecord("stop", 1.0, 2**22 - 1, 1.0, "cpu"))
        expect(page.locator("#run-resume")).to_be_visible()

    def test_start_right_after_check_gives_no_error(self, view, served, tmp_path):
        Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")
        page, faults = view(), []
        page.on("response", lambda answer: answer.status >= 500 and faults.append(answer.url))
        tab(page, "Train")
        page.locator("#drop-photos input[type=file]").set_input_files(str(tmp_path / "a.png"))
        expect(page.locator("#thumbnails img")).to_have_count(1)
        page.locator("#trigger textarea, #trigger input").fill("<quick>")
        page.locator("#class-noun textarea, #class-noun input").fill("quick")
        for wait in (0, 300, 1500):  # until a report begins, while it is made
            page.locator("#check").click()
            page.wait_for_timeout(wait)
            page.locator("#start").click()
            expect(page.get_by_text("is in the queue").first).to_be_visible()
            expect(page.get_by_text("is in the queue")).to_have_count(0)
        page.wait_for_timeout(2000)
        assert faults == []
        assert page.locator("span.error:visible").count() == 0
        for run in served.workspace.glob("runs/quick*"):
            Client(served.url, verbose=False).predict(run=run.name, api_name="/stop_run")
