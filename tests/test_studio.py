"""The studio through its API, with the page served by this process."""

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import numpy as np
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

import rite_diffusion as rite
from random_adapters import small_adapter
from rite_diffusion.adapters import load_adapter
from rite_diffusion.errors import StudioError
from rite_diffusion.fusion.sketch import load_sketch
from rite_diffusion.generation.denoise import sample
from rite_diffusion.generation.metadata import read_parameters
from rite_diffusion.studio.serve import Settings, launch
from studio_server import SHORT, pocket_adapter, studio, wait_for_state

pytestmark = pytest.mark.usefixtures("quick_statistics")
ENDPOINTS = {
    "/add_photos", "/adapters", "/ask_run", "/clear_photo_set", "/compare", "/conflicts",
    "/convert_adapter", "/delete_adapter", "/delete_photo_set", "/download_adapter", "/fuse",
    "/generate", "/import_adapter", "/photo_sets", "/read_picture", "/rename_adapter",
    "/rename_photo_set", "/resume_run", "/run_state", "/runs", "/stop_run", "/train",
    "/undo_delete",
}  # fmt: skip


@pytest.fixture
def client(served, tmp_path):
    return Client(served.url, verbose=False, download_files=str(tmp_path / "down"))


@pytest.fixture(scope="module")
def pair(served, tmp_path_factory) -> list[str]:
    """Two adapters of the library."""
    folder, names = tmp_path_factory.mktemp("pair"), ["left", "right"]
    client = Client(served.url, verbose=False)
    for seed, name in enumerate(names):
        file = pocket_adapter(folder / f"{name}.safetensors", f"<{name}>", seed)
        assert client.predict(file=handle_file(str(file)), api_name="/import_adapter") == name
    return names


def get(url: str, **headers: str) -> int:
    """The status of a request."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def pixels(file: str | Path) -> np.ndarray:
    return np.asarray(Image.open(file))


def test_the_page_is_laid_out_without_torch():
    code = "import sys, rite_diffusion.studio.app; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_endpoints_have_stable_names_and_types(client):
    described = client.view_api(return_format="dict")["named_endpoints"]
    assert set(described) == ENDPOINTS
    types = {each["parameter_name"]: each["python_type"]["type"]
             for each in described["/generate"]["parameters"]}  # fmt: skip
    assert types["prompt"] == "str" and types["seed"] == "int"


def test_the_api_trains_on_uploads_and_draws_with_the_adapter(client, photos, served):
    files = [handle_file(str(path)) for path in sorted(photos.iterdir())]
    run = client.predict(
        photos=files, trigger="<thing>", class_noun="toy", settings=SHORT, name="api toy",
        api_name="/train",
    )  # fmt: skip
    wait_for_state(served.workspace / "runs" / run, "finished")
    told = client.predict(run=run, api_name="/run_state")
    assert (told["state"], told["step"], told["total"]) == ("finished", 4, 4)
    caption = served.workspace / "photos/api toy/0.txt"
    assert caption.read_text() == "a <thing> on a red background"
    [card] = [each for each in client.predict(api_name="/adapters") if each["run"] == run]
    assert card["trigger"] == "<thing>" and card["ranks"] == "16"
    [file] = client.predict(
        prompt="a <thing>", adapters=[f"{run}:0.8"], steps=2, seed=5, api_name="/generate"
    )
    facts = read_parameters(Path(file))
    assert (facts.prompt, facts.seed, facts.steps) == ("a <thing>", 5, 2)
    assert facts.adapters[0].weight == 0.8
    adapter = served.workspace / "runs" / run / "adapter.safetensors"
    [same] = rite.generate("a <thing>", adapters=[f"{adapter}:0.8"], steps=2, seed=5)
    assert np.array_equal(pixels(file), np.asarray(same))


def test_parameters_of_a_picture_give_the_same_pixels(client):
    settings = {"prompt": "a cat", "negative": "red", "steps": 3, "seed": 9, "guidance": 2.5}
    [file] = client.predict(**settings, width=72, height=64, api_name="/generate")
    found = client.predict(file=handle_file(file), api_name="/read_picture")
    again = {key: found[key] for key in (*settings, "width", "height")}
    [other] = client.predict(**again, api_name="/generate")
    assert again == settings | {"width": 72, "height": 64}
    assert np.array_equal(pixels(file), pixels(other))


def test_regions_of_the_api_equal_rite_generate(client, pair, served):
    files = [str(served.workspace / f"adapters/{name}.safetensors") for name in pair]
    regions = ["0,0,0.5,1: a <left>", "0.5,0,1,1: a <right> :: red"]
    wanted = {"prompt": "a park", "regions": regions, "steps": 2, "seed": 3}
    [file] = client.predict(**wanted, adapters=pair, api_name="/generate")
    assert read_parameters(Path(file)).regions == regions
    [same] = rite.generate(**wanted, adapters=files)
    assert np.array_equal(pixels(file), np.asarray(same))


def test_conflicts_are_reported_and_their_statistics_kept(client, pair, served):
    told = client.predict(adapters=[pair[0], f"{pair[1]}:0.5"], api_name="/conflicts")
    assert told["concepts"] == ["<left>", "<right>"] and told["method"] == "gram"
    assert 0 < sum(told["after"]) < sum(told["before"])
    for name in pair:
        assert load_sketch(served.workspace / f"adapters/{name}.sketch.safetensors").concept
    names = [each["name"] for each in client.predict(api_name="/adapters")]
    assert set(pair) <= set(names) and not any("sketch" in name for name in names)


def test_a_fusion_of_the_api_equals_rite_fuse_and_draws(client, pair, served, tmp_path):
    files = [served.workspace / f"adapters/{name}.safetensors" for name in pair]
    name = client.predict(adapters=[pair[0], f"{pair[1]}:0.5"], name="both", api_name="/fuse")
    assert name == "both"
    ours = load_adapter(served.workspace / "adapters/both.safetensors")
    alone = load_adapter(rite.fuse([files[0], f"{files[1]}:0.5"], out=tmp_path / "f.safetensors"))
    assert ours.info == alone.info and ours.info.triggers() == ["<left>", "<right>"]
    for one, other in zip(ours.pairs, alone.pairs, strict=True):
        np.testing.assert_array_equal(one.down, other.down)
        np.testing.assert_array_equal(one.up, other.up)
    [file] = client.predict(prompt="a <left>", adapters=["both"], steps=1, api_name="/generate")
    assert read_parameters(Path(file)).adapters[0].file == "both.safetensors"
    assert list((served.workspace / "drafts").iterdir()) == []


def test_a_sheet_of_the_api_equals_rite_grid(client, pair, served):
    left, right = (str(served.workspace / f"adapters/{name}.safetensors") for name in pair)
    axes = {"weights": [0.5, 1.0], "seeds": [1, 2], "columns": "weight", "steps": 1}
    file = client.predict(
        prompts=["a <left>"], adapters=[[], [pair[0]], pair], **axes, api_name="/compare"
    )
    same = rite.grid(["a <left>"], adapters=["", left, [left, right]], **axes)
    assert np.array_equal(pixels(file), np.asarray(same))
    content = json.loads(Image.open(file).text["rite_grid"])
    assert content["columns"] == "weight" and len(content["pictures"]) == 6


def test_an_adapter_is_converted_for_other_programs(client, pair, served):
    file = Path(client.predict(name=pair[0], to="kohya", api_name="/convert_adapter"))
    original = load_adapter(served.workspace / "adapters/left.safetensors")
    assert file.name == "left-kohya.safetensors"
    assert load_adapter(file).ranks() == original.ranks()
    folder = client.predict(name=pair[0], to="peft", api_name="/convert_adapter")
    with zipfile.ZipFile(folder) as archive:
        assert any(name.endswith("adapter_model.safetensors") for name in archive.namelist())


def test_the_first_picture_comes_within_five_seconds(client, pocket):
    client.predict(prompt="a cat", steps=2, api_name="/generate")  # the base is open now
    start = time.monotonic()
    sample(pocket, ["a cat on a blue background"], [0])
    alone = time.monotonic() - start
    client.predict(prompt="a cat on a blue background", api_name="/generate")
    through_the_studio = time.monotonic() - start - alone
    print(f"{alone:.2f} s alone, {through_the_studio:.2f} s through the studio")
    assert through_the_studio < max(5, 2 * alone)  # on a machine that is busy with other things


def test_the_api_imports_renames_deletes_and_restores_adapters(client, served, tmp_path):
    file = small_adapter(tmp_path / "cat.safetensors", "<cat>")
    name = client.predict(file=handle_file(str(file)), api_name="/import_adapter")
    assert name == "cat"
    assert client.predict(name="cat", to="kitten", api_name="/rename_adapter") == "kitten"
    down = Path(client.predict(name="kitten", api_name="/download_adapter"))
    assert down.read_bytes() == file.read_bytes() and down.name == "kitten.safetensors"
    client.predict(name="kitten", api_name="/delete_adapter")
    assert not (served.workspace / "adapters/kitten.safetensors").exists()
    assert client.predict(api_name="/undo_delete") == "kitten"
    client.predict(name="kitten", api_name="/delete_adapter")


BAD = {
    "no such adapter": ("/generate", {"prompt": "x", "adapters": ["../x"]}, "no adapter"),
    "bad side": ("/generate", {"prompt": "x", "width": 7}, "not a multiple of 8"),
    "bad region": ("/generate", {"prompt": "x", "regions": ["0,0,2,1: x"]}, "must hold"),
    "a path for a base": ("/generate", {"prompt": "x", "base": "/etc"}, "no base model"),
    "too many": ("/generate", {"prompt": "x", "num": 10_000}, "not between 1 and 64"),
    "a path for a run": ("/run_state", {"run": "../../etc"}, "is not a name"),
    "an unknown run": ("/stop_run", {"run": "nobody"}, "no 'nobody' among the runs"),
    "a path for an adapter": ("/download_adapter", {"name": "/etc/passwd"}, "no adapter"),
    "a path for a name": ("/rename_adapter", {"name": "x", "to": "../y"}, "no adapter 'x'"),
    "a path to convert": ("/convert_adapter", {"name": "/etc/x", "to": "peft"}, "no adapter"),
    "a path to fuse": ("/fuse", {"adapters": ["/etc/a", "/etc/b"]}, "no adapter"),
    "one adapter": ("/conflicts", {"adapters": ["x"]}, "two adapters or more"),
    "an unknown method": ("/fuse", {"adapters": ["x", "y"], "method": "../x"}, "no method"),
    "a path on a sheet": ("/compare", {"prompts": ["x"], "adapters": [["/etc/x"]]}, "no adapter"),
    "a huge sheet": ("/compare", {"prompts": ["x"], "seeds": [1] * 300}, "300 pictures"),
    "a file that is not uploaded": (
        "/import_adapter", {"file": {"path": "/etc/passwd"}}, "not uploaded"),
    "a picture that is not uploaded": (
        "/read_picture", {"file": {"path": "/etc/passwd"}}, "not uploaded"),
    "markup": ("/stop_run", {"run": "<img src=x onerror=alert(1)>"}, "&lt;img"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_errors_of_the_api_are_messages_without_markup(client, case):
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


def test_only_uploads_and_copies_are_served(served):
    for path in paths_outside(served.workspace):
        assert get(f"{served.url}gradio_api/file={path}") in (403, 404), path


def test_requests_to_other_host_names_are_refused(served):
    assert get(served.url) == 200
    assert get(served.url, Host="evil.example:7860") == 400
    assert get(f"{served.url}config", Host="evil.example") == 400


def test_an_upload_over_the_limit_is_refused(served, monkeypatch):
    monkeypatch.setattr(served.page, "max_file_size", 1000)
    body = b"--x\r\nContent-Disposition: form-data; name=files; filename=a.png\r\n\r\n"
    body += bytes(5000) + b"\r\n--x--\r\n"
    request = urllib.request.Request(
        f"{served.url}gradio_api/upload",
        data=body,
        headers={"Content-Type": "multipart/form-data; boundary=x"},
    )
    with pytest.raises(urllib.error.HTTPError) as fault:
        urllib.request.urlopen(request)
    assert fault.value.code == 413


def test_a_public_studio_without_login_and_a_used_workspace_are_refused(tmp_path):
    with pytest.raises(StudioError, match="--auth"):
        launch(Settings(tmp_path, host="0.0.0.0"))
    with pytest.raises(StudioError, match="--auth"):
        launch(Settings(tmp_path, share=True))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(StudioError, match="cannot write to /proc"):
        launch(Settings(Path("/proc/studio")))


def test_a_container_without_a_password_is_an_error_of_one_line(tmp_path):
    script = Path(__file__).parents[1] / "app/app.py"
    environment = os.environ | {"RITE_WORKSPACE": str(tmp_path / "space")}
    environment.pop("RITE_AUTH", None)
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "Add --auth user:password" in done.stderr
    assert not (tmp_path / "space").exists()


def test_mcp_names_the_package_that_it_needs(tmp_path, monkeypatch):
    monkeypatch.setattr("rite_diffusion.studio.serve.find_spec", lambda name: None)
    with pytest.raises(StudioError, match=r"pip install 'gradio\[mcp\]'"):
        launch(Settings(tmp_path / "space", mcp=True))


def test_users_see_only_their_own_files(tmp_path, monkeypatch):
    monkeypatch.setattr("rite_diffusion.studio.access.PAUSE", 0)
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
        file = small_adapter(tmp_path / "secret.safetensors")
        ann.predict(file=handle_file(str(file)), api_name="/import_adapter")
        assert [each["name"] for each in ann.predict(api_name="/adapters")] == ["secret"]
        assert bob.predict(api_name="/adapters") == []
        with pytest.raises(AppError, match="no adapter"):
            bob.predict(name="secret", api_name="/download_adapter")
        assert (tmp_path / "space/users/ann/adapters/secret.safetensors").exists()
