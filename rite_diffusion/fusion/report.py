"""The conflicts between adapters before and after fusion, from second moments of layers' inputs.

Per layer, with D_i the update of concept i and x_i its inputs:

    crosstalk of j on i   |D_j x_i| / |D_i x_i|           size of j's output on i's inputs
    error of an update D  |(D - D_i) x_i| / |D_i x_i|     0: as with adapter i alone; 1: lost
    drift of D            |D x_0| / mean |D_i x_i|        size of its output on ordinary prompts

|D x| is the root mean square over the inputs. Totals are medians over layers, which are robust to
single layers. "Before" is the plain sum of all updates, as with several attached adapters.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median

from rite_diffusion.adapters import Adapter
from rite_diffusion.fusion.layer import Factors, Layer, Part, flat, output_energy, stack
from rite_diffusion.fusion.members import Member, check_and_sort, layers
from rite_diffusion.fusion.methods.gram import with_statistics
from rite_diffusion.fusion.second_moments import AnySecondMoment

WORST = 8  # number of worst layers in a report


@dataclass(frozen=True)
class LayerConflict:
    """The ratios of one layer; NaN where a concept has no update there."""

    name: str
    crosstalk: list[list[float]]  # [i][j]: of j on i
    before: list[float]  # error per concept of the plain sum
    after: list[float]  # error per concept of the fused adapter
    drift_before: float
    drift_after: float

    @property
    def worst(self) -> float:
        """The largest error after fusion."""
        return max((value for value in self.after if not math.isnan(value)), default=0.0)


@dataclass(frozen=True)
class ConflictReport:
    """The ratios of all layers, and their medians."""

    method: str
    concepts: list[str]
    crosstalk: list[list[float]]
    before: list[float]
    after: list[float]
    drift_before: float
    drift_after: float
    layers: list[LayerConflict]

    def worst_layers(self) -> list[LayerConflict]:
        """The layers with the largest errors after fusion."""
        return sorted(self.layers, key=lambda layer: -layer.worst)[:WORST]

    def as_dict(self) -> dict:
        """The report as JSON-compatible values; NaN becomes None."""
        content = asdict(self) | {"worst": [layer.name for layer in self.worst_layers()]}
        return {key: _without_nan(value) for key, value in content.items()}


def report_on(members: Sequence[Member], fused: Adapter) -> ConflictReport:
    """The conflicts of members, which must have sketches, before and after their fusion."""
    members = check_and_sort(members)
    made = {pair.name: flat(pair, 1.0) for pair in fused.pairs}
    found = [layer_conflict(layer, made[layer.name]) for layer, _ in layers(members)]
    count = range(len(members))
    return ConflictReport(
        method=fused.info.method.removeprefix("fused: "),
        concepts=[member.label for member in members],
        crosstalk=[[_median(each.crosstalk[i][j] for each in found) for j in count] for i in count],
        before=[_median(each.before[i] for each in found) for i in count],
        after=[_median(each.after[i] for each in found) for i in count],
        drift_before=_median(each.drift_before for each in found),
        drift_after=_median(each.drift_after for each in found),
        layers=found,
    )


def layer_conflict(layer: Layer, fused: Factors) -> LayerConflict:
    """The ratios of one layer."""
    with_statistics(layer)
    parts = layer.parts
    total = stack([part.factors for part in parts])
    own = [_rms_output(part.factors, part.second_moment) for part in parts]
    crosstalk = [
        [_ratio(_rms_output(other.factors, part.second_moment), alone) for other in parts]
        for part, alone in zip(parts, own, strict=True)
    ]
    usual = [value for value in own if value > 0]
    scale = sum(usual) / len(usual) if usual else 0.0
    return LayerConflict(
        layer.name,
        crosstalk,
        [_error(total, part, alone) for part, alone in zip(parts, own, strict=True)],
        [_error(fused, part, alone) for part, alone in zip(parts, own, strict=True)],
        _ratio(_rms_output(total, layer.base), scale),
        _ratio(_rms_output(fused, layer.base), scale),
    )


def _rms_output(factors: Factors, moment: AnySecondMoment | None) -> float:
    """Root mean square output of an update; 0 where there are no statistics."""
    return output_energy(factors, moment) ** 0.5 if moment is not None else 0.0


def _error(update: Factors, part: Part, alone: float) -> float:
    negative = Factors(-part.factors.up, part.factors.down)
    return _ratio(_rms_output(stack([update, negative]), part.second_moment), alone)


def _ratio(value: float, of: float) -> float:
    return value / of if of > 0 else math.nan


def _median(values) -> float:
    known = [value for value in values if not math.isnan(value)]
    return median(known) if known else math.nan


def _without_nan(value):
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and math.isnan(value) else value
