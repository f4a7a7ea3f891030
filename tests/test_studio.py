"""The studio through its API, with the page served by this process."""

import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

import rite_diffusion as rite
from rite_diffusion.generation.metadata import read_parameters
from rite_diffusion.generation.sampler import sample
from rite_diffusion.types import StudioError
from rite_diffusion.ui.history import restore
from rite_diffusion.ui.serve import Settings, launch
from rite_diffusion.ui.workspace import Workspace
from studio_server import SHORT, studio, wait_for_state
from test_studio_files import an_adapter

ENDPOINTS = {
    "/adapters", "/ask_run", "/delete_adapter", "/download_adapter", "/generate",
    "/import_adapter", "/rename_adapter", "/resume_run", "/run_state", "/runs", "/stop_run",
    "/train", "/undo_delete",
}  # fmt: skip


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("studio") / "space"


@pytest.fixture(scope="module")
def page(workspace):
    with studio(workspace) as page:
        yield page


@pytest.fixture
def client(page, tmp_path):
    return Client(page.local_url, verbose=False, download_files=str(tmp_path / "down"))


def get(url: str, cookie: str = "") -> int:
    """The status of a request."""
    request = urllib.request.Request(url, headers={"Cookie": cookie} if cookie else {})
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def test_the_page_is_laid_out_without_torch():
    code = "import sys, rite_diffusion.ui.app; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_endpoints_have_stable_names_and_types(client):
    described = client.view_api(return_format="dict")["named_endpoints"]
    assert set(described) == ENDPOINTS
    types = {each["parameter_name"]: each["python_type"]["type"]
             for each in described["/generate"]["parameters"]}  # fmt: skip
    assert types["prompt"] == "str" and types["seed"] == "int"


def test_a_photo_becomes_an_adapter_becomes_a_picture(client, photos, workspace):
    files = [handle_file(str(path)) for path in sorted(photos.iterdir())]
    run = client.predict(
        photos=files, trigger="<thing>", class_noun="toy", settings=SHORT, api_name="/train"
    )
    wait_for_state(workspace / "runs" / run, "finished")
    told = client.predict(run=run, api_name="/run_state")
    assert (told["state"], told["step"], told["total"]) == ("finished", 4, 4)
    assert (workspace / "photos/toy/0.txt").read_text() == "a <thing> on a red background"
    [card] = [each for each in client.predict(api_name="/adapters") if each["run"] == run]
    assert card["trigger"] == "<thing>" and card["ranks"] == "8"
    [file] = client.predict(
        prompt="a <thing>", adapters=[f"{run}:0.8"], steps=2, seed=5, api_name="/generate"
    )
    facts = read_parameters(Path(file))
    assert (facts.prompt, facts.seed, facts.steps) == ("a <thing>", 5, 2)
    assert facts.adapters[0]["weight"] == 0.8
    adapter = workspace / "runs" / run / "adapter.safetensors"
    [same] = rite.generate("a <thing>", adapters=[f"{adapter}:0.8"], steps=2, seed=5)
    assert np.array_equal(np.asarray(Image.open(file)), np.asarray(same))


def test_parameters_of_a_picture_give_the_same_pixels(client, workspace):
    settings = {"prompt": "a cat", "negative": "red", "steps": 3, "seed": 9, "guidance": 2.5}
    [file] = client.predict(**settings, width=72, height=64, api_name="/generate")
    found = restore(Workspace(workspace), Path(file)).parameters
    again = {key: getattr(found, key) for key in (*settings, "width", "height")}
    [other] = client.predict(**again, api_name="/generate")
    assert again == settings | {"width": 72, "height": 64}
    assert np.array_equal(np.asarray(Image.open(file)), np.asarray(Image.open(other)))


def test_the_first_picture_comes_within_five_seconds(client, pocket):
    client.predict(prompt="a cat", steps=2, api_name="/generate")  # the base is open now
    start = time.monotonic()
    sample(pocket, ["a cat on a blue background"], [0])
    alone = time.monotonic() - start
    client.predict(prompt="a cat on a blue background", api_name="/generate")
    through_the_studio = time.monotonic() - start - alone
    print(f"{alone:.2f} s alone, {through_the_studio:.2f} s through the studio")
    assert through_the_studio < max(5, 2 * alone)  # on a machine that is busy with other things


def test_the_library_over_the_api(client, workspace, tmp_path):
    file = an_adapter(tmp_path / "cat.safetensors", "<cat>")
    name = client.predict(file=handle_file(str(file)), api_name="/import_adapter")
    assert name == "cat"
    assert client.predict(name="cat", to="kitten", api_name="/rename_adapter") == "kitten"
    down = Path(client.predict(name="kitten", api_name="/download_adapter"))
    assert down.read_bytes() == file.read_bytes() and down.name == "kitten.safetensors"
    client.predict(name="kitten", api_name="/delete_adapter")
    assert not (workspace / "adapters/kitten.safetensors").exists()
    assert client.predict(api_name="/undo_delete") == "kitten.safetensors"


BAD = {
    "no such adapter": ("/generate", {"prompt": "x", "adapters": ["../x"]}, "no adapter"),
    "bad side": ("/generate", {"prompt": "x", "width": 7}, "not a multiple of 8"),
    "a path for a base": ("/generate", {"prompt": "x", "base": "/etc"}, "no base model"),
    "too many": ("/generate", {"prompt": "x", "num": 10_000}, "not between 1 and 64"),
    "a path for a run": ("/run_state", {"run": "../../etc"}, "is no name"),
    "an unknown run": ("/stop_run", {"run": "nobody"}, "no 'nobody' among the runs"),
    "a path for an adapter": ("/download_adapter", {"name": "/etc/passwd"}, "no adapter"),
    "a path for a name": ("/rename_adapter", {"name": "x", "to": "../y"}, "no adapter 'x'"),
    "a file that is not uploaded": (
        "/import_adapter", {"file": {"path": "/etc/passwd"}}, "not uploaded"),
    "markup": ("/stop_run", {"run": "<img src=x onerror=alert(1)>"}, "&lt;img"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_errors_are_words_and_never_markup(client, case):
    endpoint, arguments, words = BAD[case]
    with pytest.raises(AppError) as fault:
        client.predict(**arguments, api_name=endpoint)
    assert words in str(fault.value).lower() and "Traceback" not in str(fault.value)


def paths_outside(workspace: Path) -> list[str]:
    inside = str(workspace / "studio.json")
    return ["/etc/passwd", "../../../etc/passwd", "%2e%2e/%2e%2e/etc/passwd",
            "..%2f..%2fetc/passwd", inside, "/proc/self/environ",
            f"{workspace}/.page/../studio.json",
            f"{workspace}/.page/%2e%2e/studio.json"]  # fmt: skip


def test_no_file_but_uploads_and_copies_is_served(page, workspace):
    for path in paths_outside(workspace):
        assert get(f"{page.local_url}gradio_api/file={path}") in (403, 404), path


def test_an_upload_over_the_limit_is_refused(page, monkeypatch):
    monkeypatch.setattr(page.app, "uploaded_file_dir", page.app.uploaded_file_dir)
    monkeypatch.setattr(page, "max_file_size", 1000)
    body = b"--x\r\nContent-Disposition: form-data; name=files; filename=a.png\r\n\r\n"
    body += bytes(5000) + b"\r\n--x--\r\n"
    request = urllib.request.Request(
        f"{page.local_url}gradio_api/upload",
        data=body,
        headers={"Content-Type": "multipart/form-data; boundary=x"},
    )
    with pytest.raises(urllib.error.HTTPError) as fault:
        urllib.request.urlopen(request)
    assert fault.value.code == 413


def test_an_open_door_and_a_taken_workspace_are_refused(tmp_path):
    with pytest.raises(StudioError, match="--auth"):
        launch(Settings(tmp_path, host="0.0.0.0"))
    with pytest.raises(StudioError, match="--auth"):
        launch(Settings(tmp_path, share=True))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(StudioError, match="cannot write to /proc"):
        launch(Settings(Path("/proc/studio")))


def test_users_see_only_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr("rite_diffusion.ui.access.PAUSE", 0)
    logins = ("ann:first password", "bob:second password")
    with studio(tmp_path / "space", auth=logins) as page:
        assert get(f"{page.local_url}gradio_api/file=/etc/passwd") == 401
        assert get(f"{page.local_url}config") == 401
        call = urllib.request.Request(
            f"{page.local_url}gradio_api/call/adapters",
            data=json.dumps({"data": []}).encode(),
            headers={"Content-Type": "application/json"},
        )
        with pytest.raises(urllib.error.HTTPError) as fault:
            urllib.request.urlopen(call)
        assert fault.value.code == 401
        ann, bob = (
            Client(page.local_url, auth=tuple(login.split(":")), verbose=False,
                   download_files=str(tmp_path / login[:3]))
            for login in logins
        )  # fmt: skip
        file = an_adapter(tmp_path / "secret.safetensors")
        ann.predict(file=handle_file(str(file)), api_name="/import_adapter")
        assert [each["name"] for each in ann.predict(api_name="/adapters")] == ["secret"]
        assert bob.predict(api_name="/adapters") == []
        with pytest.raises(AppError, match="no adapter"):
            bob.predict(name="secret", api_name="/download_adapter")
        assert (tmp_path / "space/users/ann/adapters/secret.safetensors").exists()
