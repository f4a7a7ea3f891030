"""The axes of a sweep: the values that settings take, each with a label for names and tables."""

import math
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import PurePath
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from rite_diffusion.config import explain, flatten, known_keys, merge, nest
from rite_diffusion.config.section import Section
from rite_diffusion.errors import ConfigError

# Settings that say on what a training is tried, not how it is done.
CONDITIONS = {
    *("seed", "photos", "trigger", "class_noun", "class_photos", "templates", "repeats"),
    "dataset",
}
PATHS = {"photos", "class_photos", "base", "lora.init_from", "lora.assistant"}
DIGITS = 3  # significant digits of a drawn number, so that names stay short
LABEL = 40  # characters of a label at most


class Range(Section):
    """Numbers to draw from; whole ones where both ends are written as whole numbers."""

    low: int | float = Field(description="the smallest number")
    high: int | float = Field(description="the largest number")
    scale: Literal["linear", "log"] = "linear"

    @model_validator(mode="after")
    def _has_numbers(self):
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"low = {self.low} is not below high = {self.high}")
        if self.scale == "log" and self.low <= 0:
            raise ValueError(f"low = {self.low}: a range on a log scale lies above 0")
        return self

    def draw(self, generator: random.Random) -> int | float:
        """A number of the range, with three significant digits; uniform on its scale."""
        if self.scale == "log":
            number = math.exp(generator.uniform(math.log(self.low), math.log(self.high)))
        else:
            number = generator.uniform(self.low, self.high)
        if isinstance(self.low, int) and isinstance(self.high, int):
            return min(max(round(number), self.low), self.high)
        return min(max(float(f"{number:.{DIGITS}g}"), float(self.low)), float(self.high))


@dataclass(frozen=True)
class Choice:
    """One value of an axis."""

    label: str
    settings: dict[str, Any]  # a settings tree


@dataclass(frozen=True)
class Axis:
    """A name, and the values of a setting, or of several that change together."""

    name: str
    choices: list[Choice]  # empty for a range
    range: Range | None = None

    @property
    def is_condition(self) -> bool:
        """Whether it changes only on what is trained: photos, concept, seed.

        Scores are averaged over such axes.
        """
        keys = {key for choice in self.choices for key in flatten(choice.settings)}
        return self.range is None and keys <= CONDITIONS

    def draw(self, generator: random.Random) -> Choice:
        """One of the values at random."""
        if self.range is None:
            return generator.choice(self.choices)
        number = self.range.draw(generator)
        return Choice(label_of(self.name, number), nest(self.name, number))


def read_axes(table: Mapping[str, Any]) -> list[Axis]:
    """The axes of `[sweep.axes]` by name; raises ConfigError for those that cannot be used.

    Their order in the file does not count, so that runs keep their names where it changes.
    """
    axes = [_axis(name, values) for name, values in sorted(_leaves(table, "").items())]
    if not axes:
        raise ConfigError('[sweep.axes] is empty: give one, such as "optim.lr" = [1e-4, 1e-3].')
    owners: dict[str, str] = {}
    for axis in axes:
        for key in {axis.name} if axis.range else _keys(axis):
            if key in owners:
                raise ConfigError(f"the axes '{owners[key]}' and '{axis.name}' both set {key}.")
            owners[key] = axis.name
    return axes


def _keys(axis: Axis) -> set[str]:
    return {key for choice in axis.choices for key in flatten(choice.settings)}


def _leaves(table: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Values by dotted key: TOML makes tables of `optim.lr = [...]`; a range is itself a table."""
    leaves: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping) and not value.keys() & Range.model_fields.keys():
            leaves |= _leaves(value, f"{prefix}{key}.")
        else:
            leaves[prefix + key] = value
    return leaves


def _axis(name: str, values: Any) -> Axis:
    if isinstance(values, Mapping):
        return Axis(_known(name), [], _range(name, dict(values)))
    if not isinstance(values, list) or not values:
        raise ConfigError(
            f"axis '{name}' = {values!r}: give a list of values, or for search = "
            f'"random" or "halving" a range such as {{low = 1e-5, high = 1e-2, scale = "log"}}.'
        )
    if len({repr(value) for value in values}) < len(values):
        raise ConfigError(f"axis '{name}' has a value twice: {values}.")
    if name not in known_keys() and all(isinstance(value, Mapping) for value in values):
        choices = [_together(name, dict(value)) for value in values]
    else:
        _known(name)
        choices = [Choice(label_of(name, value), nest(name, value)) for value in values]
    return Axis(name, _with_distinct_labels(choices))


def _known(name: str) -> str:
    """The name of a setting; ConfigError with the nearest one for another name."""
    if name in known_keys():
        return name
    near = get_close_matches(name, known_keys(), n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'? " if near else ""
    raise ConfigError(
        f"axis '{name}' is no setting: {hint}For settings that change together, give a list of "
        "tables, each with its settings."
    )


def _range(name: str, table: dict[str, Any]) -> Range:
    try:
        return Range.model_validate(table)
    except ValidationError as error:
        faults = "; ".join(explain(fault, Range) for fault in error.errors())
        raise ConfigError(f"axis '{name}': {faults}") from None


def _together(name: str, table: dict[str, Any]) -> Choice:
    """A value of several settings; its label is its `name`, or the first setting's value."""
    label = table.pop("name", None)
    settings: dict[str, Any] = {}
    for key, value in table.items():
        settings = merge(settings, nest(key, value))
    if not settings and label is None:
        raise ConfigError(f"axis '{name}' has a table without settings: give it a name at least.")
    first = next(iter(flatten(settings).items()), ("", label))
    return Choice(label_of(*first) if label is None else label_of("", label), settings)


def label_of(key: str, value: Any) -> str:
    """A value as a part of a file's name: of a path its last part, else its text."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    text = PurePath(value).name if key in PATHS and isinstance(value, str) else str(value)
    return re.sub(r"[^\w.+-]+", "-", text).strip("-.")[:LABEL] or "none"


def _with_distinct_labels(choices: list[Choice]) -> list[Choice]:
    """The choices; a label that was there before, in any case, gets a number."""
    taken: set[str] = set()
    distinct = []
    for choice in choices:
        label, number = choice.label, 2
        while label.casefold() in taken:
            label, number = f"{choice.label}-{number}", number + 1
        taken.add(label.casefold())
        distinct.append(Choice(label, choice.settings))
    return distinct
