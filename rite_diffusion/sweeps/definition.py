"""A sweep as it is written: the settings of a training, and a table `[sweep]`."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from rite_diffusion.config import explain, read_toml
from rite_diffusion.config.section import Section
from rite_diffusion.errors import ConfigError
from rite_diffusion.sweeps.axes import Axis, read_axes
from rite_diffusion.sweeps.scores import SCORES

EXAMPLE = 'such as [sweep.axes] with "optim.lr" = [1e-4, 1e-3]'


class SweepSection(Section):
    """How settings are chosen along the axes, and what each run gets on a cluster."""

    search: Literal["grid", "random", "halving"] = Field(
        default="grid",
        description="every combination; some drawn at random; or successive halving",
    )
    axes: dict[str, Any] = Field(
        description="setting -> list of values, or range {low, high, scale}; or any name -> list "
        "of tables whose settings change together"
    )
    runs: int | None = Field(
        default=None,
        ge=1,
        le=10_000,
        description="combinations to draw; of halving at its start, default: all",
    )
    seed: int = Field(default=0, ge=0, description="of the draws")
    preset: str | None = Field(
        default=None, description="preset of every run; default: the one of its base and method"
    )
    score: str = Field(default="validation", description="what decides: the validation loss")
    first_steps: int | None = Field(
        default=None, ge=1, description="halving: steps after which the first are dropped"
    )
    factor: int = Field(
        default=3,
        ge=2,
        le=100,
        description="halving: one in so many goes on, with so many times the steps",
    )
    cpus: float = Field(default=1, ge=0, le=1024, description="on Ray: CPUs of a run")
    gpus: float | None = Field(
        default=None, ge=0, le=64, description="on Ray: GPUs of a run; default: 1 where there are"
    )
    retries: int = Field(
        default=3, ge=0, le=100, description="on Ray: how often a run whose worker is lost goes on"
    )

    @model_validator(mode="after")
    def _search_has_its_settings(self):
        if self.score not in SCORES:
            raise ValueError(f"score = {self.score}: choose {' or '.join(SCORES)}")
        if self.search == "random" and self.runs is None:
            raise ValueError("search = random needs runs, the number of combinations to draw")
        if self.search == "grid" and self.runs is not None:
            raise ValueError("runs is for search = random or halving; a grid has all combinations")
        if (self.search == "halving") != (self.first_steps is not None):
            raise ValueError(
                "search = halving needs first_steps, the steps after which the first are dropped; "
                "other searches have none"
            )
        return self


@dataclass(frozen=True)
class Definition:
    """A checked `[sweep]` table with the settings that all runs share."""

    settings: dict[str, Any]  # the tree that `rite train` would take
    section: SweepSection
    axes: list[Axis]

    @property
    def candidate_axes(self) -> list[Axis]:
        """The axes whose values compete."""
        return [axis for axis in self.axes if not axis.is_condition]

    @property
    def condition_axes(self) -> list[Axis]:
        """The axes over which scores are averaged: photos, concepts, seeds."""
        return [axis for axis in self.axes if axis.is_condition]


def read_definition(tree: Mapping[str, Any], where: str = "the sweep") -> Definition:
    """The checked definition of a sweep's settings tree.

    Raises ConfigError for what cannot be used; `where` is the sweep's name in its messages.
    """
    settings = dict(tree)
    table = settings.pop("sweep", None)
    if not isinstance(table, Mapping):
        raise ConfigError(f"{where} has no [sweep] table: add one with axes, {EXAMPLE}.")
    try:
        section = SweepSection.model_validate(dict(table))
    except ValidationError as error:
        faults = "; ".join(explain(fault, SweepSection) for fault in error.errors())
        raise ConfigError(f"[sweep]: {faults}") from None
    axes = read_axes(section.axes)
    ranges = [axis.name for axis in axes if axis.range]
    if ranges and (section.search == "grid" or section.runs is None):
        raise ConfigError(
            f"axis '{ranges[0]}' is a range, from which values are drawn: list values, or set "
            'search = "random" (or "halving") with runs.'
        )
    return Definition(settings, section, axes)


def read_definition_file(path: Path) -> Definition:
    """The definition in a TOML file; raises ConfigError where it cannot be used."""
    return read_definition(read_toml(path), str(path))
