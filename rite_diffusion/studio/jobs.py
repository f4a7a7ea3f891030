"""Training jobs: processes of their own, whose run folders are all that is known of them.

The studio adds two files to a run folder: job.toml, the settings that were asked for, and job.json,
whether the run waits, which process works on it, and whether it was told to stop. Everything else
is the run's own. So a job outlives the page and the studio, and is found again.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import tomlkit

from rite_diffusion.errors import StudioError
from rite_diffusion.files.writing import read_json, write_atomically
from rite_diffusion.training.lock import is_in_use

PATIENCE = 30.0  # seconds after which a second wish to stop kills
LIVE = ("starting", "preparing", "running", "stopping")


@dataclass(frozen=True)
class Order:
    """What job.json holds."""

    wish: str  # "run" or "stop"
    since: float  # seconds since the epoch at which the wish was told
    pid: int = 0  # 0: it waits for its turn
    born: float = 0.0  # when that process began, to tell it from a later one of that number
    device: str = ""

    def process(self) -> psutil.Process | None:
        """The process that works on the run, while it lives."""
        return living(self.pid, self.born)


def living(pid: int, born: float) -> psutil.Process | None:
    """The process with a number and a birth, None where it has ended."""
    try:
        process = psutil.Process(pid) if pid else None
        if process is None or abs(process.create_time() - born) > 1:
            return None
        return None if process.status() == psutil.STATUS_ZOMBIE else process
    except psutil.NoSuchProcess:
        return None


def read_order(run: Path) -> Order | None:
    """The studio's order for a run, None for a run that the studio did not start."""
    content = read_json(run / "job.json")
    return Order(**content) if content else None


def write_order(run: Path, order: Order) -> None:
    """Keep an order."""
    write_atomically(run / "job.json", json.dumps(asdict(order)).encode())


def state_of(run: Path) -> str:
    """queued, starting, preparing, running, stopping, stopped, failed or finished."""
    told = read_json(run / "status.json")
    order = read_order(run)
    if order is None:
        return _state_elsewhere(run, told)
    if order.process() is not None:
        current = told.get("pid") == order.pid
        return "stopping" if order.wish == "stop" else told["state"] if current else "starting"
    if is_in_use(run):  # a terminal has gone on with it
        return told.get("state", "starting")
    if order.pid == 0 and order.wish == "run":
        return "queued"
    ended = told.get("state", "")
    if ended in ("finished", "stopped", "failed") and told.get("pid") == order.pid:
        return ended
    return "stopped" if order.wish == "stop" else "failed"


def _state_elsewhere(run: Path, told: dict[str, Any]) -> str:
    """The state of a run that `rite train` was started on by hand."""
    state = told.get("state", "failed")
    if state in ("preparing", "running") and not is_in_use(run):
        return "failed"
    return state


def last_line(run: Path) -> str:
    """What a run's process printed last, or wrote into its log."""
    for path in (run / "output.txt", run / "log.txt"):
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        words = text.strip().split("\n")[-1].strip()
        if words:
            return words.removeprefix("rite: ")
    return ""


class JobQueue:
    """Starts the runs that wait, the oldest first, one at a time on each device."""

    def __init__(self, runs: Callable[[], Iterable[Path]], devices: Callable[[], list[str]]):
        self._runs = runs
        self._devices = devices
        self._children: list[subprocess.Popen] = []  # only to collect their exit codes

    def submit(self, run: Path, settings: dict[str, Any]) -> None:
        """Put a new run, in a folder that is still free, at the end of the queue."""
        run.mkdir(parents=True)
        write_atomically(run / "job.toml", tomlkit.dumps(settings).encode())
        write_order(run, Order("run", time.time()))

    def resume(self, run: Path) -> None:
        """Put a run that was stopped or failed at the end of the queue."""
        state = state_of(run)
        if state not in ("stopped", "failed"):
            raise StudioError(f"'{run.name}' is {state}: only a stopped or failed run can go on.")
        write_order(run, Order("run", time.time()))

    def stop(self, run: Path) -> str:
        """Ask a run to end after its step; asked again after a while, kill it. Returns what was."""
        state, order = state_of(run), read_order(run)
        process = order.process() if order else None
        if process is None and state in LIVE:
            raise StudioError(f"'{run.name}' was started in a terminal: press Ctrl-C there.")
        if order is not None and state == "queued":
            write_order(run, replace(order, wish="stop", since=time.time()))
        elif order is not None and process is not None and order.wish == "run":
            write_order(run, replace(order, wish="stop", since=time.time()))
            process.send_signal(signal.SIGTERM)
        elif order is not None and process is not None and time.time() - order.since > PATIENCE:
            os.killpg(order.pid, signal.SIGKILL)
        return state

    def ask(self, run: Path, what: str) -> None:
        """Ask a run at work for `save` (a checkpoint) or `sample` (previews) after its step."""
        state = state_of(run)
        if state != "running":
            raise StudioError(f"'{run.name}' is {state}: it can be asked once it is running.")
        (run / "requests").mkdir(exist_ok=True)
        (run / "requests" / what).touch()

    def waiting(self) -> list[Path]:
        """Runs that wait, in the order of their turns."""
        queued = [run for run in self._runs() if state_of(run) == "queued"]
        return sorted(queued, key=lambda run: order.since if (order := read_order(run)) else 0.0)

    def turn(self) -> None:
        """Start what can be started now."""
        self._children = [child for child in self._children if child.poll() is None]
        waiting = self.waiting()
        if not waiting:
            return
        busy = {order.device for run in self._runs() if (order := _at_work(run))}
        free = [device for device in self._devices() if device not in busy]
        for run, device in zip(waiting, free, strict=False):
            self._start(run, device)

    def _start(self, run: Path, device: str) -> None:
        # What was resolved wins over what was asked for: a preset may have changed since.
        settings = next(p for p in (run / "config.toml", run / "job.toml") if p.exists())
        command = [sys.executable, "-P", "-m", "rite_diffusion", "train", str(settings)]
        with (run / "output.txt").open("wb") as output:
            child = subprocess.Popen(
                [*command, "--out", str(run)],
                cwd=run,
                env=environment(device),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C at the studio does not reach it
            )
        self._children.append(child)
        born = psutil.Process(child.pid).create_time()
        write_order(run, Order("run", time.time(), child.pid, born, device))


def _at_work(run: Path) -> Order | None:
    order = read_order(run)
    return order if order is not None and order.process() is not None else None


def environment(device: str) -> dict[str, str]:
    """The environment of a process that works on one device."""
    chosen = {} if device == "cpu" else {"CUDA_VISIBLE_DEVICES": device}
    return os.environ | chosen | {"PYTHONUNBUFFERED": "1"}
