"""Runs on this machine: each a process of its own, so that one that crashes ends no other."""

import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from rite_diffusion.sweeps.folder import Job
from rite_diffusion.sweeps.runner import OnEnd, SweepStopped
from rite_diffusion.training.interrupt import stop_on_signal
from rite_diffusion.training.launch import (
    device_environment,
    devices,
    last_line,
    start_training,
)
from rite_diffusion.training.lock import is_in_use

PAUSE = 0.2  # seconds between looks at the processes


@dataclass
class _Going:
    """A run in progress; without a process it is one that an earlier sweep has started."""

    job: Job
    device: str
    process: subprocess.Popen | None

    def has_ended(self) -> bool:
        if self.process is not None:
            return self.process.poll() is not None
        return not is_in_use(self.job.path)


def run_here(jobs: Sequence[Job], on_end: OnEnd, parallel: int | None = None) -> None:
    """Run jobs, `parallel` at a time, by default one on each device; `on_end` is told each end.

    A run that another process still works on is waited for. Raises SweepStopped after Ctrl-C or
    SIGTERM, once every run has ended with its last step.
    """
    places = _places(parallel)
    waiting, going = deque(jobs), list[_Going]()
    with stop_on_signal() as request:
        try:
            while (waiting or going) and not request.is_set():
                while waiting and len(going) < len(places):
                    free = list(places)
                    for each in going:
                        free.remove(each.device)
                    going.append(_start(waiting.popleft(), free[0], len(places)))
                time.sleep(PAUSE)
                going = _look(going, waiting, on_end)
        finally:
            _stop(going)
    if request.signal is not None:
        raise SweepStopped(request.signal)


def _places(parallel: int | None) -> list[str]:
    """The device of each run at a time."""
    found = devices()
    count = parallel or len(found)
    return [found[index % len(found)] for index in range(count)]


def _start(job: Job, device: str, places: int) -> _Going:
    if is_in_use(job.path):
        return _Going(job, device, None)
    environment = device_environment(device)
    if places > 1 and device == "cpu":  # else each would take all cores
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // places)))
    process = start_training(job.write_settings(), job.path, environment, job.preset)
    return _Going(job, device, process)


def _look(going: Sequence[_Going], waiting: deque[Job], on_end: OnEnd) -> list[_Going]:
    """The runs that still go; for each of the others `on_end` is called, or it waits again."""
    still = []
    for each in going:
        job, process = each.job, each.process
        if not each.has_ended():
            still.append(each)
        elif job.is_complete():
            on_end(job, None)
        elif is_in_use(job.path):  # a process of an earlier sweep was first
            still.append(_Going(job, each.device, None))
        elif process is None:
            waiting.appendleft(job)
        else:
            on_end(job, _reason(job, process.returncode))
    return still


def _reason(job: Job, code: int) -> str:
    """Why a run's process has ended without its adapter."""
    if code < 0:
        return f"its process was killed by {signal.Signals(-code).name}"
    return last_line(job.path) or f"its process ended with code {code}"


def _stop(going: Sequence[_Going]) -> None:
    """End the runs after their steps; at once where a second Ctrl-C comes."""
    processes = [each.process for each in going if each.process is not None]
    for process in processes:
        process.terminate()
    try:
        for process in processes:
            process.wait()
    except KeyboardInterrupt:
        for process in processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        raise
