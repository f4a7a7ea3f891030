"""Which runs a sweep does, and to which length: all to the end, or by successive halving.

Successive halving (Jamieson & Talwalkar 2016, Alg. 1; Li et al. 2018, Alg. 1, the inner loop): all
candidates train for a few steps, the best share of them goes on for more, until few have done all.
"""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rite_diffusion.sweeps.definition import Definition
from rite_diffusion.sweeps.folder import Job, SweepFolder
from rite_diffusion.sweeps.runs import SweepRun
from rite_diffusion.sweeps.scores import SCORES


@dataclass(frozen=True)
class Candidate:
    """A combination of settings with the mean of its runs' scores."""

    name: str
    score: float
    jobs: list[Job]


def rungs(first: int, steps: int, factor: int) -> list[int]:
    """The lengths in steps: `first`, each `factor` times the one before, and at last `steps`."""
    lengths = []
    while first < steps:
        lengths.append(first)
        first *= factor
    return [*lengths, steps]


def schedule(
    definition: Definition, runs: Sequence[SweepRun], folder: SweepFolder
) -> Iterator[list[Job]]:
    """The jobs that can be done side by side, rung by rung.

    Once a rung is done, the next is asked for: then the scores on disk decide which candidates go
    on. One with a failed run or without a score does not.
    """
    section = definition.section
    if section.first_steps is None:
        yield [folder.job(run, run.config.steps, section.preset) for run in runs]
        return
    lengths = rungs(section.first_steps, runs[0].config.steps, section.factor)
    remaining = list(runs)
    for length in lengths:
        jobs = [folder.job(run, length, section.preset) for run in remaining]
        yield jobs
        ranked = rank(jobs, section.score)
        kept = {each.name for each in ranked[: max(1, _candidates(jobs) // section.factor)]}
        remaining = [run for run in remaining if run.candidate in kept]


def _candidates(jobs: Sequence[Job]) -> int:
    return len({job.run.candidate for job in jobs})


def rank(jobs: Sequence[Job], score: str) -> list[Candidate]:
    """The candidates all of whose jobs are complete and have a score, the best first."""
    groups: dict[str, list[Job]] = {}
    for job in jobs:
        groups.setdefault(job.run.candidate, []).append(job)
    found = []
    for name, own in groups.items():
        scores = [score_of(job, score) for job in own if job.is_complete()]
        known = [value for value in scores if value is not None]
        if len(known) == len(own):
            found.append(Candidate(name, statistics.mean(known), own))
    return sorted(found, key=lambda each: SCORES[score].rank(each.score))


def score_of(job: Job, score: str) -> float | None:
    """The score of a job's run after its steps; None where it has none."""
    return SCORES[score].read(job.path, job.steps)
