"""Training jobs: each a process of its own, whose whole state is in its run folder.

The studio adds two files to a run folder: job.toml with the settings that were asked for, and
job.json with the `JobRecord`. All other files are those of `rite train`. A job therefore survives
the page and the studio, and a studio that starts again finds it.
"""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import tomlkit

from rite_diffusion.config import read_toml
from rite_diffusion.errors import ConfigError, StudioError
from rite_diffusion.files.writing import read_json, write_atomically
from rite_diffusion.training.launch import device_environment, last_line, start_training
from rite_diffusion.training.lock import is_in_use

KILL_AFTER = 30.0  # seconds after the first request to stop, from which another one kills
KEYS = {"wish": "desired", "born": "started"}  # key in job.json -> field of JobRecord
ACTIVE = ("starting", "preparing", "running", "stopping")


@dataclass(frozen=True)
class JobRecord:
    """The content of job.json."""

    desired: str  # the state that the user asked for: "run" or "stop"
    since: float  # when `desired` was set, in seconds since the epoch
    pid: int = 0  # of the run's process; 0 while the run is queued
    started: float = 0.0  # when that process began: another may have the number later
    device: str = ""

    def process(self) -> psutil.Process | None:
        """The run's process; None where it has not begun or has ended."""
        return find_process(self.pid, self.started)


def find_process(pid: int, started: float) -> psutil.Process | None:
    """The process with a number and a time of start; None where it has ended."""
    try:
        process = psutil.Process(pid) if pid else None
        if process is None or abs(process.create_time() - started) > 1:
            return None
        return None if process.status() == psutil.STATUS_ZOMBIE else process
    except psutil.NoSuchProcess:
        return None


def read_job(run: Path) -> JobRecord | None:
    """The studio's record of a run; None for a run that the studio did not start."""
    content = read_json(run / "job.json")
    return JobRecord(**{KEYS.get(k, k): v for k, v in content.items()}) if content else None


def write_job(run: Path, job: JobRecord) -> None:
    """Write a run's record."""
    names = {name: key for key, name in KEYS.items()}
    content = {names.get(name, name): value for name, value in asdict(job).items()}
    write_atomically(run / "job.json", json.dumps(content).encode())


def state_of(run: Path) -> str:
    """The run's state: queued or one of ACTIVE, stopped, failed or finished."""
    status = read_json(run / "status.json")
    job = read_job(run)
    if job is None:
        return _state_without_record(run, status)
    if job.process() is not None:
        current = status.get("pid") == job.pid
        return "stopping" if job.desired == "stop" else status["state"] if current else "starting"
    if is_in_use(run):  # `rite train` in a terminal has resumed it
        return status.get("state", "starting")
    if job.pid == 0 and job.desired == "run":
        return "queued"
    ended = status.get("state", "")
    if ended in ("finished", "stopped", "failed") and status.get("pid") == job.pid:
        return ended
    return "stopped" if job.desired == "stop" else "failed"


def _state_without_record(run: Path, status: dict[str, Any]) -> str:
    """The state of a run that the studio did not start."""
    state = status.get("state", "failed")
    if state in ("preparing", "running") and not is_in_use(run):
        return "failed"
    return state


def was_refused(run: Path) -> bool:
    """Whether a failed run ended with a message of `rite train` before its first step.

    The same command would say the same again.
    """
    path = run / "output.txt"
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    refused = text.strip().split("\n")[-1].startswith("rite: ")
    return refused and state_of(run) == "failed" and not (run / "metrics.jsonl").exists()


def settings_of(run: Path) -> dict[str, Any]:
    """A run's settings, resolved ones where it has begun; empty where it has none yet."""
    for name in ("config.toml", "job.toml"):
        try:
            return read_toml(run / name)
        except ConfigError:
            continue
    return {}


class JobQueue:
    """Starts queued runs, the oldest first, one at a time on each device."""

    def __init__(self, runs: Callable[[], Iterable[Path]], devices: Callable[[], list[str]]):
        self._runs = runs
        self._devices = devices
        self._children: list[subprocess.Popen] = []  # only to collect their exit codes

    def submit(self, run: Path, settings: dict[str, Any]) -> None:
        """Append a new run to the queue; its folder must not exist yet."""
        run.mkdir(parents=True)
        write_atomically(run / "job.toml", tomlkit.dumps(settings).encode())
        write_job(run, JobRecord("run", time.time()))

    def resume(self, run: Path) -> None:
        """Append a stopped or failed run to the queue; StudioError in any other state."""
        state = state_of(run)
        if state not in ("stopped", "failed"):
            raise StudioError(f"'{run.name}' is {state}: only a stopped or failed run can go on.")
        if was_refused(run):
            raise StudioError(
                f"'{run.name}' would fail in the same way: {last_line(run)} Mend that and start a "
                "new training."
            )
        write_job(run, JobRecord("run", time.time()))

    def stop(self, run: Path) -> str:
        """Ask a run to end after its step and return the state it was in.

        Asked again after KILL_AFTER seconds, its process is killed.
        """
        state, job = state_of(run), read_job(run)
        process = job.process() if job else None
        if process is None and state in ACTIVE:
            raise StudioError(f"'{run.name}' was started in a terminal: press Ctrl-C there.")
        if job is not None and state == "queued":
            write_job(run, replace(job, desired="stop", since=time.time()))
        elif job is not None and process is not None and job.desired == "run":
            write_job(run, replace(job, desired="stop", since=time.time()))
            process.send_signal(signal.SIGTERM)
        elif job is not None and process is not None and time.time() - job.since > KILL_AFTER:
            os.killpg(job.pid, signal.SIGKILL)
        return state

    def ask(self, run: Path, what: str) -> None:
        """Ask a running run for `save` (a checkpoint) or `sample` (previews) after its step."""
        state = state_of(run)
        if state != "running":
            raise StudioError(f"'{run.name}' is {state}: it can be asked once it is running.")
        (run / "requests").mkdir(exist_ok=True)
        (run / "requests" / what).touch()

    def waiting(self) -> list[Path]:
        """Queued runs, in the order in which they will start."""
        queued = [run for run in self._runs() if state_of(run) == "queued"]
        return sorted(queued, key=lambda run: job.since if (job := read_job(run)) else 0.0)

    def start_waiting(self) -> None:
        """Start as many queued runs as there are free devices."""
        self._children = [child for child in self._children if child.poll() is None]
        waiting = self.waiting()
        if not waiting:
            return
        busy = {job.device for run in self._runs() if (job := _running_job(run))}
        free = [device for device in self._devices() if device not in busy]
        for run, device in zip(waiting, free, strict=False):
            self._start(run, device)

    def _start(self, run: Path, device: str) -> None:
        # Resolved settings first: presets may have changed since the run was queued.
        settings = next(p for p in (run / "config.toml", run / "job.toml") if p.exists())
        child = start_training(settings, run, device_environment(device), cwd=run)
        self._children.append(child)
        started = psutil.Process(child.pid).create_time()
        write_job(run, JobRecord("run", time.time(), child.pid, started, device))


def _running_job(run: Path) -> JobRecord | None:
    job = read_job(run)
    return job if job is not None and job.process() is not None else None
