"""A studio of the test's own: its page in this process, its trainings in processes of theirs."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rite_diffusion.files.writing import read_json
from rite_diffusion.studio.jobs import ACTIVE, read_job, state_of
from rite_diffusion.studio.serve import Settings, launch

# Settings of a training that is over in seconds, or never, as lines of the Train tab.
SHORT = """
prior.weight = 0
steps = 4
batch = 1
previews.every = 2
previews.steps = 2
checkpoints.every = 2
"""
ENDLESS = SHORT.replace("steps = 4", "steps = 100000").replace(
    "previews.every = 2", "previews.every = 0"
)


@dataclass(frozen=True)
class Served:
    """A studio at work: Gradio's page, and the folder that it works in."""

    page: Any
    workspace: Path

    @property
    def url(self) -> str:
        return self.page.local_url


@contextmanager
def studio(workspace: Path, **settings) -> Iterator:
    """A studio on a free port of the loopback; its trainings are ended with it."""
    before = os.environ.get("GRADIO_TEMP_DIR")
    page = launch(Settings(workspace, port=None, **settings))
    try:
        yield page
    finally:
        page.close()
        (workspace / "studio.json").unlink()
        for run in workspace.rglob("runs/*/"):
            end(run)
        if before is None:
            del os.environ["GRADIO_TEMP_DIR"]
        else:
            os.environ["GRADIO_TEMP_DIR"] = before


def end(run: Path) -> None:
    """Kill what works on a run."""
    job = read_job(run)
    if job is not None and job.process() is not None:
        os.killpg(job.pid, signal.SIGKILL)


def wait_for(condition: Callable[[], object], what: str, seconds: float = 120):
    """The condition's value once it is true."""
    limit = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < limit, f"waited {seconds:g} s for {what}"
        time.sleep(0.1)
    return value


def wait_for_state(run: Path, *states: str) -> str:
    """The run's state once it is one of these."""

    def reached():
        state = state_of(run)
        assert state in (*ACTIVE, "queued", *states), f"{state}: {output(run)}"
        return state if state in states else None

    return wait_for(reached, f"{run.name} to be {' or '.join(states)}")


def output(run: Path) -> str:
    """What a run's process has printed."""
    path = run / "output.txt"
    return path.read_text() if path.exists() else ""


def step_of(run: Path) -> int:
    """Steps that a run has done."""
    path = run / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def pid_of(run: Path) -> int:
    """The process that the status file names."""
    return read_json(run / "status.json")["pid"]


def pocket_adapter(path: Path, trigger: str, seed: int) -> Path:
    """An adapter of the pocket base that has learned nothing but noise."""
    from random_adapters import random_adapter
    from rite_diffusion.adapters import save_adapter
    from rite_diffusion.backbones.source import load_backbone

    backbone = load_backbone("pocket")
    adapter = random_adapter(backbone, 2, 0.2, seed)
    info = replace(
        adapter.info, trigger=trigger, base="pocket", base_fingerprint=backbone.fingerprint
    )
    save_adapter(path, replace(adapter, info=info))
    return path
