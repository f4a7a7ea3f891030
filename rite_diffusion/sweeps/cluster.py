"""Runs on a Ray cluster: its scheduler places them, and its retries continue those that are lost.

A run whose worker or machine is lost is started again elsewhere by Ray, and goes on from its newest
checkpoint: all machines need the sweep's folder, the photos and this package under the same paths.
"""

import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rite_diffusion.errors import RiteError
from rite_diffusion.sweeps.definition import SweepSection
from rite_diffusion.sweeps.folder import Job, is_complete
from rite_diffusion.sweeps.runner import OnEnd, Runner, SweepStopped
from rite_diffusion.training.interrupt import stop_on_signal
from rite_diffusion.training.lock import is_in_use
from rite_diffusion.training.plan import plan_training
from rite_diffusion.training.run import run_training
from rite_diffusion.training.settings import configure

PAUSE = 1.0  # seconds
STOPPING = 60.0  # seconds that runs have to end after a stop


class ClusterError(RiteError):
    """Ray is not installed, or its cluster cannot be used."""


@contextmanager
def ray_cluster(address: str, section: SweepSection) -> Iterator[Runner]:
    """A runner on the Ray cluster at `address`, connected until the block ends.

    `auto` is a cluster that runs here, `local` a new one on this machine. A connection that there
    is already is used, and stays. Raises ClusterError where there is no such cluster.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent to Ray's makers
    try:
        import ray
    except ImportError:
        raise ClusterError(
            "Ray is not installed: pip install 'rite-diffusion[cluster]', or leave out --ray."
        ) from None
    connected = ray.is_initialized()
    if not connected:
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
        except (ConnectionError, ValueError, RuntimeError) as error:
            [line, *_] = str(error).splitlines() or [type(error).__name__]
            raise ClusterError(
                f"no Ray cluster at {address!r} ({line}): start one with `ray start --head`, or "
                "use --ray local for one on this machine."
            ) from None
    gpus = section.gpus
    if gpus is None:
        gpus = min(1, ray.cluster_resources().get("GPU", 0))
    task = ray.remote(num_cpus=section.cpus, num_gpus=gpus, max_retries=section.retries)(train_run)
    try:
        yield lambda jobs, on_end: _run(ray, task, jobs, on_end)
    finally:
        if not connected:
            ray.shutdown()


def _run(ray: Any, task: Any, jobs: Sequence[Job], on_end: OnEnd) -> None:
    """Run jobs; raises SweepStopped after Ctrl-C or SIGTERM, once their steps have ended."""
    going: dict[Any, Job] = {}
    for job in jobs:
        job.write_settings()
        named = task.options(name=job.run.name)
        reference = named.remote(
            str(job.path.absolute()), job.settings, job.preset, job.steps, str(Path.cwd())
        )
        going[reference] = job
    with stop_on_signal() as request:
        while going and not request.is_set():
            ended, _ = ray.wait(list(going), timeout=PAUSE)
            for reference in ended:
                on_end(going.pop(reference), _reason(ray, reference))
        if request.signal is not None:
            for reference in going:
                ray.cancel(reference)
            if going:
                ray.wait(list(going), num_returns=len(going), timeout=STOPPING)
            raise SweepStopped(request.signal)


def train_run(run: str, settings: dict[str, Any], preset: str | None, steps: int, cwd: str) -> None:
    """Train a run in a worker of the cluster; goes on where another one has left it."""
    os.chdir(cwd)  # paths in the settings are relative to where the command was given
    path = Path(run)
    while is_in_use(path):  # a worker that the cluster takes for lost still trains
        time.sleep(PAUSE)
    if not is_complete(path, steps):
        run_training(plan_training(configure(settings, preset)), path)


def _reason(ray: Any, reference: Any) -> str | None:
    """Why a task has failed; None where it has not."""
    try:
        ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        return str(cause) if isinstance(cause, RiteError) else f"{type(cause).__name__}: {cause}"
    except ray.exceptions.RayError as error:
        [line, *_] = str(error).splitlines() or [type(error).__name__]
        return line
    return None
