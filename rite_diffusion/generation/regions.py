"""Regions of a picture with prompts of their own: parsing, shares of cells, adapter factors."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rite_diffusion.errors import ConfigError

FORM = '"x0,y0,x1,y1: prompt", with fractions of width and height, such as "0,0,0.5,1: a cat"'
WORD_FORM = '"at word: prompt", with a word of the picture\'s prompt'
ATTENTION = "attention"  # each region's cells attend to its own prompt
PREDICTIONS = "predictions"  # each region's prediction, mixed by shares
SHARPNESS = 4  # of the border between overlapping regions: exponent of the depth


@dataclass(frozen=True)
class Region:
    """A box, in fractions of the picture's sides, with its prompt."""

    left: float
    top: float
    right: float
    bottom: float
    prompt: str
    negative: str = ""
    weights: tuple[float, ...] | None = None  # one per adapter; None: by the prompt's triggers

    def __str__(self) -> str:
        box = ",".join(f"{side:g}" for side in (self.left, self.top, self.right, self.bottom))
        return _written(box, self)


@dataclass(frozen=True)
class WordRegion:
    """A region without a box yet: it is where the plain picture shows a word of the prompt."""

    word: str
    prompt: str
    negative: str = ""
    weights: tuple[float, ...] | None = None

    def at(self, left: float, top: float, right: float, bottom: float) -> Region:
        """The region with a box."""
        return Region(left, top, right, bottom, self.prompt, self.negative, self.weights)

    def __str__(self) -> str:
        return _written(f"at {self.word}", self)


def _written(place: str, region: Region | WordRegion) -> str:
    fields = [f"{place}: {region.prompt}"]
    if region.negative or region.weights is not None:
        fields.append(region.negative)
    if region.weights is not None:
        fields.append(",".join(f"{weight:g}" for weight in region.weights))
    return " :: ".join(fields)


def parse_regions(texts: Sequence[str], prompt: str) -> list[Region | WordRegion]:
    """The regions of texts with a box, or `at WORD: ...` with a word of the prompt.

    ConfigError for other texts and for words that the prompt lacks.
    """
    parts: list[Region | WordRegion] = []
    for text in texts:
        part = _parse_word_region(text) if text.split()[:1] == ["at"] else parse_region(text)
        if isinstance(part, WordRegion) and not word_pattern(part.word).search(prompt):
            raise ConfigError(f"region '{text}': the prompt '{prompt}' has no '{part.word}'")
        parts.append(part)
    return parts


def parse_region(text: str) -> Region:
    """The region of `x0,y0,x1,y1: prompt [:: negative [:: weights]]`; ConfigError otherwise.

    `weights` are numbers, one per adapter in their order; an empty field takes the default.
    """
    box, colon, rest = text.partition(":")
    corners = _numbers(box)
    if not colon or len(corners) != 4:
        raise ConfigError(f"region '{text}' is not {FORM}, nor {WORD_FORM}")
    left, top, right, bottom = corners
    if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
        raise ConfigError(f"region '{text}': 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1 must hold")
    return Region(left, top, right, bottom, *_fields(text, rest))


def _parse_word_region(text: str) -> WordRegion:
    place, colon, rest = text.partition(":")
    word = " ".join(place.split()[1:])
    if not colon or not word:
        raise ConfigError(f"region '{text}' is not {WORD_FORM}")
    return WordRegion(word, *_fields(text, rest))


def _fields(text: str, rest: str) -> tuple[str, str, tuple[float, ...] | None]:
    """Prompt, negative prompt and weights in the rest of a region's text."""
    fields = [field.strip() for field in rest.split("::")]
    prompt, negative, weights = [*fields, "", ""][:3]
    if not prompt or len(fields) > 3:
        raise ConfigError(f"region '{text}' is not {FORM} [:: negative [:: weights]]")
    chosen = tuple(_numbers(weights)) if weights else None
    if weights and not (chosen and all(-10 <= weight <= 10 for weight in chosen)):
        raise ConfigError(f"region '{text}': weights '{weights}' are not numbers from -10 to 10")
    return prompt, negative, chosen


def word_pattern(word: str) -> re.Pattern[str]:
    """A pattern that finds a word, or a phrase, but not inside longer words."""
    return re.compile(rf"(?<!\w){re.escape(word)}(?!\w)")


def _numbers(text: str) -> list[float]:
    """The numbers of a comma-separated list; empty where one of them is not a finite number."""
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        return []
    return numbers if all(math.isfinite(number) for number in numbers) else []


def region_shares(regions: Sequence[Region], height: int, width: int) -> Tensor:
    """Shares (1 + regions, height, width) that sum to 1 in every cell; the whole picture's first.

    Outside all boxes the whole picture has share 1, inside a box its region. Where boxes overlap,
    shares are in proportion to depth^SHARPNESS: continuous, and close to 0 or 1 except on a narrow
    border, so that attributes do not mix.
    """
    depths = torch.stack([_depth(region, height, width) for region in regions]).double()
    powers = depths**SHARPNESS
    total = powers.sum(0)
    inside = powers / total.where(total > 0, 1.0)
    outside = (total == 0).double()
    return torch.cat([outside[None], inside]).float()


def _depth(region: Region, height: int, width: int) -> Tensor:
    """Depth (height, width) of each cell's centre in the box: 0 outside, 1 in its middle."""
    x = (torch.arange(width).double() + 0.5) / width
    y = (torch.arange(height).double() + 0.5) / height
    across = torch.minimum(x - region.left, region.right - x) * 2 / (region.right - region.left)
    down = torch.minimum(y - region.top, region.bottom - y) * 2 / (region.bottom - region.top)
    return torch.minimum(across[None, :], down[:, None]).clamp(min=0)


def adapter_weights(
    regions: Sequence[Region | WordRegion], prompt: str, triggers: Sequence[Sequence[str]]
) -> list[list[float]]:
    """Factors [1 + regions][adapters] on the adapters' weights, the whole picture's first.

    `triggers` are each adapter's. A region's own `weights` are its factors. Otherwise, an adapter
    that some region calls, by a trigger in its prompt or by its weights, has factor 1 in those
    regions, and in the whole picture if the prompt calls it too; one that no region calls has
    factor 1 everywhere. ConfigError where the number of weights is wrong.
    """
    for region in regions:
        if region.weights is not None and len(region.weights) != len(triggers):
            raise ConfigError(
                f"region '{region}' has {len(region.weights)} weights for {len(triggers)} adapters"
            )
    routed = [
        any(_calls_adapter(region, index, words) for region in regions)
        for index, words in enumerate(triggers)
    ]
    rows = []
    for text, own in [(prompt, None), *((each.prompt, each.weights) for each in regions)]:
        called = [_contains_any(text, words) for words in triggers]
        usual = [float(c or not r) for c, r in zip(called, routed, strict=True)]
        rows.append(usual if own is None else list(own))
    return rows


def _calls_adapter(region: Region | WordRegion, index: int, words: Sequence[str]) -> bool:
    """Whether a region calls the adapter of an index, whose triggers are `words`."""
    if region.weights is not None and region.weights[index] != 0:
        return True
    return _contains_any(region.prompt, words)


def _contains_any(prompt: str, triggers: Sequence[str]) -> bool:
    """Whether the prompt contains one of the triggers as a whole word."""
    return any(word_pattern(word).search(prompt) for word in triggers)
