"""The runs of a sweep, by name: combinations of the axes' values."""

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from rite_diffusion.config import TrainConfig, merge
from rite_diffusion.errors import ConfigError
from rite_diffusion.sweeps.axes import Axis, Choice
from rite_diffusion.sweeps.definition import Definition
from rite_diffusion.sweeps.scores import SCORES
from rite_diffusion.training.settings import configure

MOST_RUNS = 10_000
LONGEST_NAME = 150  # characters
PLAIN = "all"  # the candidate of a sweep over conditions alone
TRIES = 100  # draws for each new combination

Combination = dict[str, Choice]  # axis -> value


@dataclass(frozen=True)
class SweepRun:
    """One combination of the axes' values."""

    name: str  # of its folder: `optim.lr=0.001,seed=0`
    candidate: str  # the name without the axes over which scores are averaged
    values: dict[str, str]  # axis -> label
    settings: dict[str, Any]  # the tree that `rite train` takes
    config: TrainConfig  # the same over its preset


def runs_of(definition: Definition) -> list[SweepRun]:
    """Every run, with its settings checked; candidates side by side, so that parts are balanced.

    Raises ConfigError for a sweep whose runs cannot be made.
    """
    conditions = _grid(definition.condition_axes)
    found = _candidates(definition)
    if len(conditions) * len(found) > MOST_RUNS:
        raise ConfigError(
            f"the axes make {len(conditions) * len(found):,} runs, at most {MOST_RUNS:,} are "
            'possible: give fewer values, or set search = "random" with runs.'
        )
    runs = [_run(definition, one | other) for other in conditions for one in found]
    if definition.section.search == "halving":
        _check_halving(definition, runs)
    return runs


def _candidates(definition: Definition) -> list[Combination]:
    section, axes = definition.section, definition.candidate_axes
    if section.search != "grid" and not axes:
        raise ConfigError(
            f"search = {section.search} chooses among settings, and the axes change only photos or "
            'seed: use search = "grid".'
        )
    if section.runs is None:
        return _grid(axes)
    return _drawn(axes, section.runs, section.seed)


def _grid(axes: Sequence[Axis]) -> list[Combination]:
    if math.prod(len(axis.choices) for axis in axes) > MOST_RUNS:
        raise ConfigError(
            f'the axes have more than {MOST_RUNS:,} combinations: set search = "random" with runs.'
        )
    names = [axis.name for axis in axes]
    every = itertools.product(*(axis.choices for axis in axes))
    return [dict(zip(names, values, strict=True)) for values in every]


def _drawn(axes: Sequence[Axis], count: int, seed: int) -> list[Combination]:
    """`count` different combinations; a larger count begins with the same ones."""
    generator = random.Random(seed)
    found: dict[str, Combination] = {}
    for _ in range(TRIES * count):
        values = {axis.name: axis.draw(generator) for axis in axes}
        found.setdefault(_name(values), values)
        if len(found) == count:
            return list(found.values())
    raise ConfigError(
        f"runs = {count}, and the axes have hardly more than {len(found)} different combinations: "
        'lower it, or use search = "grid".'
    )


def _run(definition: Definition, values: Combination) -> SweepRun:
    ordered = {axis.name: values[axis.name] for axis in definition.axes}
    settings = definition.settings
    for choice in ordered.values():
        settings = merge(settings, choice.settings)
    name = _name(ordered)
    try:
        config = configure(settings, definition.section.preset)
    except ConfigError as error:
        raise ConfigError(f"run {name}: {error}") from None
    labels = {axis: choice.label for axis, choice in ordered.items()}
    competing = {axis.name: ordered[axis.name] for axis in definition.candidate_axes}
    return SweepRun(name, _name(competing) or PLAIN, labels, settings, config)


def _name(values: Combination) -> str:
    """`axis=label,axis=label`; a long one is cut and ends with a digest of the whole."""
    name = ",".join(f"{axis}={choice.label}" for axis, choice in values.items())
    name = name.replace("/", "-").replace("\\", "-")
    if len(name) <= LONGEST_NAME:
        return name
    digest = sha256(name.encode()).hexdigest()[:8]
    return f"{name[: LONGEST_NAME - 9]}-{digest}"


def _check_halving(definition: Definition, runs: Sequence[SweepRun]) -> None:
    section = definition.section
    steps = {run.config.steps for run in runs}
    if len(steps) > 1:
        raise ConfigError(
            f"halving compares after equal steps, and the runs have {sorted(steps)}: set steps."
        )
    assert section.first_steps is not None  # checked with the section
    if section.first_steps >= max(steps):
        raise ConfigError(
            f"first_steps = {section.first_steps} is not below steps = {max(steps)}, with which "
            "the last runs end: lower it."
        )
    for run in runs:
        if reason := SCORES[section.score].refusal(run.config):
            raise ConfigError(f"run {run.name}: {reason}.")
