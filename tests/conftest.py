"""Fixtures that several test modules share."""

import gc
import os
import shutil
import socket
from dataclasses import replace
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may reach for a network
# One thread in each process, also in those that tests start: workers share the machine, and sums
# depend on the number. OMP_NUM_THREADS=8 helps the tests of full size, which run one at a time.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin starve a busy machine

from PIL import Image  # noqa: E402

from command_line import run_command  # noqa: E402
from models import (  # noqa: E402
    tiny_stable_diffusion,
    tiny_stable_diffusion_2,
    tiny_stable_diffusion_xl,
)
from random_adapters import random_adapter  # noqa: E402
from rite_diffusion.adapters import save_adapter  # noqa: E402
from rite_diffusion.backbones.source import load_backbone  # noqa: E402
from rite_diffusion.studio import fusing  # noqa: E402
from shared_bases import give_back, shared_base  # noqa: E402
from studio_page import opened_browser, second_adapter, sessions  # noqa: E402
from studio_server import Served, studio  # noqa: E402


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """A cache of the test's own; the user's stays as it is."""
    monkeypatch.setenv("RITE_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def served(tmp_path_factory):
    """A studio that its tests share: one page, one workspace, one open base."""
    workspace = tmp_path_factory.mktemp("studio") / "space"
    with studio(workspace) as page:
        yield Served(page, workspace)


def pytest_collection_finish():
    """From here on, rounds of the garbage collector are few and look at new objects only."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown():
    """After a test and all its fixtures, the bases that it shared are as they were."""
    yield
    give_back()


@pytest.fixture(scope="module")  # while it is open, asyncio has a loop that other tests would find
def browser():
    """Debian's chromium."""
    with opened_browser() as browser:
        yield browser


@pytest.fixture(scope="session")
def second(served, tmp_path_factory) -> str:
    """An adapter of the library beside the one that a browser's test trains."""
    return second_adapter(served, tmp_path_factory.mktemp("second"))


@pytest.fixture
def view(browser, served):
    """A function that opens the page in a fresh session."""
    with sessions(browser, served.url) as open_page:
        yield open_page


@pytest.fixture
def quick_statistics(monkeypatch):
    """The studio draws the pictures of a fusion's statistics in 2 steps instead of 20."""
    monkeypatch.setattr(fusing, "STEPS", 2)


@pytest.fixture
def pocket():
    """The embedded base, shared: a test leaves it as it was, but for adapters."""
    return shared_base("pocket")


@pytest.fixture
def own_pocket():
    """The embedded base, opened for one test, which may change it."""
    return load_backbone("pocket")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """A diffusers folder in Stable Diffusion 1.x's shape, with small random weights."""
    folder = tmp_path_factory.mktemp("tiny") / "tiny-sd"
    tiny_stable_diffusion().save_pretrained(folder)
    return folder


@pytest.fixture
def tiny(tiny_folder):
    """That folder's base, shared: a test leaves it as it was, but for adapters."""
    return shared_base(str(tiny_folder))


@pytest.fixture(scope="session")
def tiny_folder_2(tmp_path_factory) -> Path:
    """The same in Stable Diffusion 2.x's shape."""
    folder = tmp_path_factory.mktemp("tiny") / "tiny-sd2"
    tiny_stable_diffusion_2().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_folder_xl(tmp_path_factory) -> Path:
    """The same in Stable Diffusion XL's shape."""
    folder = tmp_path_factory.mktemp("tiny") / "tiny-sdxl"
    tiny_stable_diffusion_xl().save_pretrained(folder)
    return folder


@pytest.fixture(params=["pocket", "sd", "sdxl"])
def backbone(request):
    """Each kind of base model, small and shared."""
    folders = {"sd": "tiny_folder", "sdxl": "tiny_folder_xl"}
    name = folders.get(request.param)
    return shared_base(str(request.getfixturevalue(name)) if name else "pocket")


@pytest.fixture
def photos(tmp_path) -> Path:
    """Three small pictures, two with captions."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for index, colour in enumerate(("red", "green", "blue")):
        Image.new("RGB", (80 + 10 * index, 70), colour).save(folder / f"{index}.png")
    (folder / "0.txt").write_text("a <thing> on a red background")
    (folder / "1.txt").write_text("a {trigger} on a green background\n")
    return folder


@pytest.fixture
def command(monkeypatch, tmp_path):
    """Runs the command in the test's folder."""
    monkeypatch.chdir(tmp_path)
    return run_command


@pytest.fixture
def unused_port() -> int:
    """A TCP port of the loopback that nothing listens on."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.fixture(scope="session")
def two_adapters(tmp_path_factory, tiny_folder) -> list[Path]:
    """Two adapters of the tiny base, different in rank and alpha."""
    backbone = shared_base(str(tiny_folder))
    folder, paths = tmp_path_factory.mktemp("adapters"), []
    for seed, (rank, alpha) in enumerate([(2, 1.0), (4, 3.0)]):
        adapter = random_adapter(backbone, rank, alpha, seed)
        info = replace(
            adapter.info, trigger=f"<{seed}>", base="tiny-sd", base_fingerprint=backbone.fingerprint
        )
        paths.append(folder / f"{seed}.safetensors")
        save_adapter(paths[-1], replace(adapter, info=info))
    return paths


@pytest.fixture
def adapters(tmp_path, two_adapters) -> list[Path]:
    """The two adapters in the test's folder."""
    return [Path(shutil.copy(path, tmp_path)) for path in two_adapters]
