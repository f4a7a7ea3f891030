"""A sweep from its definition to its report."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from rite_diffusion.errors import ConfigError
from rite_diffusion.sweeps.definition import Definition
from rite_diffusion.sweeps.folder import Job, SweepFolder
from rite_diffusion.sweeps.machine import run_here
from rite_diffusion.sweeps.report import SweepResult, read_result, write_report
from rite_diffusion.sweeps.runner import Runner
from rite_diffusion.sweeps.runs import runs_of
from rite_diffusion.sweeps.schedule import schedule, score_of

MOST_PARALLEL = 1024


@contextmanager
def open_runner(
    definition: Definition, parallel: int | None = None, ray: str | None = None
) -> Iterator[Runner]:
    """What runs the jobs: this machine, `parallel` at a time, or the Ray cluster at an address.

    Raises ConfigError for numbers that cannot be, ClusterError where there is no such cluster.
    """
    if parallel is not None and not 1 <= parallel <= MOST_PARALLEL:
        raise ConfigError(f"parallel = {parallel}: give 1 to {MOST_PARALLEL} runs at a time.")
    if ray is None:
        yield partial(run_here, parallel=parallel)
        return
    if parallel is not None:
        raise ConfigError(
            "parallel is for runs on this machine: on Ray, sweep.cpus and sweep.gpus say how many "
            "fit."
        )
    from rite_diffusion.sweeps.cluster import ray_cluster

    with ray_cluster(ray, definition.section) as runner:
        yield runner


def read_sweep(definition: Definition, path: Path) -> SweepResult:
    """What a sweep's folder holds; writes nothing. Raises RiteError for another sweep's folder."""
    folder = SweepFolder(path)
    folder.refuse_foreign(definition)
    return read_result(definition, runs_of(definition), folder)


def run_sweep(
    definition: Definition,
    path: Path,
    parallel: int | None = None,
    ray: str | None = None,
    on_line: Callable[[str], None] = lambda line: None,
) -> SweepResult:
    """Do the runs that are missing in the folder `path`, write the report, and return it.

    `on_line` is called with a line about each run that ends. A run that fails ends no other. Raises
    RiteError for a sweep that cannot be run, and SweepStopped after Ctrl-C or SIGTERM.
    """
    runs = runs_of(definition)
    SweepFolder(path).refuse_foreign(definition)
    for run in runs:
        SweepFolder(path).job(run, run.config.steps, definition.section.preset).refuse_changed()
    with open_runner(definition, parallel, ray) as runner, SweepFolder(path) as folder:
        folder.write_definition(definition)
        try:
            for number, jobs in enumerate(schedule(definition, runs, folder), 1):
                rung = f"rung {number}, " if definition.section.search == "halving" else ""
                _run_jobs(jobs, folder, runner, definition.section.score, rung, on_line)
        finally:
            result = read_result(definition, runs, folder)
            write_report(result, definition)
    return result


def _run_jobs(
    jobs: list[Job],
    folder: SweepFolder,
    runner: Runner,
    score: str,
    rung: str,
    on_line: Callable[[str], None],
) -> None:
    """Run those jobs that are not complete, and record which fail."""
    missing = [job for job in jobs if not job.is_complete()]
    done = len(jobs) - len(missing)
    if done:
        on_line(f"{rung}{done} of {len(jobs)} runs were done before")
    for job in missing:
        folder.write_failure(job.run.name, None)

    def on_end(job: Job, reason: str | None) -> None:
        nonlocal done
        done += 1
        folder.write_failure(job.run.name, reason)
        value = score_of(job, score)
        figure = "" if value is None else f", {score} {value:.4g}"
        end = f"failed: {reason}" if reason else f"{job.steps} steps{figure}"
        on_line(f"{rung}{done} of {len(jobs)} {job.run.name}: {end}")

    if missing:
        runner(missing, on_end)
