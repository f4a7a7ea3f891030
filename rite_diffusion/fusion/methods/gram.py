"""Exact fusion: the update whose outputs are nearest to each concept's own, in closed form.

Mix-of-Show (Gu et al. 2023, arXiv 2305.18292) minimises sum_i E_i|(D - D_i) x|^2 over the inputs
of each concept with L-BFGS. It is a linear least-squares problem, as in RegMean (Jin et al. 2023,
arXiv 2212.09849):

    minimise   sum_i E_i|(D - D_i) x|^2 + preserve * E_0|D x|^2 + ridge |D|^2
    solved by  D = sum_i D_i G_i S^-1,   S = sum_i G_i + preserve * G_0 + ridge I

With D_i = B_i A_i that is sum_i B_i (A_i G_i S^-1): the ups are unchanged, the downs are new.
"""

import torch

from rite_diffusion.errors import FusionError
from rite_diffusion.fusion.layer import Factors, Layer, Part, output_energy, stack
from rite_diffusion.fusion.low_rank import to_rank_on_inputs
from rite_diffusion.fusion.second_moments import SecondMomentSum
from rite_diffusion.fusion.settings import FusionSettings


def gram(layer: Layer, settings: FusionSettings) -> Factors:
    """The minimiser above, of the sum of the ranks.

    A part of rank 0 has the target 0: the update should not change that concept's outputs.
    """
    parts = with_statistics(layer)
    moments = moments_of(layer, parts, settings)
    up = torch.cat([part.factors.up for part in parts], 1)
    seen = [_times_gram(part) for part in parts]
    return Factors(up, moments.solve(torch.cat(seen)))


def cut_on_inputs(layer: Layer, fused: Factors, settings: FusionSettings) -> Factors:
    """The update of at most `settings.rank` with the least output error on the concepts' inputs."""
    if settings.rank is None or settings.rank >= fused.rank:
        return fused
    moments = moments_of(layer, with_statistics(layer), settings)
    covariance = moments.times(fused.down) @ fused.down.mT
    return to_rank_on_inputs(fused, covariance, settings.rank)


def _times_gram(part: Part) -> torch.Tensor:
    assert part.second_moment is not None  # with_statistics
    return part.second_moment.times(part.factors.down)


def with_statistics(layer: Layer) -> list[Part]:
    """The parts with statistics; FusionError where a part with an update has none."""
    missing = [part for part in layer.parts if part.second_moment is None and part.factors.rank]
    if missing:
        raise FusionError(
            f"the sketch of an adapter has no statistics for {layer.name}, which the adapter "
            "changes: make the sketch again with `rite sketch`."
        )
    return [part for part in layer.parts if part.second_moment is not None]


def moments_of(layer: Layer, parts: list[Part], settings: FusionSettings) -> SecondMomentSum:
    """S in the equations of this module."""
    grams = [part.second_moment for part in parts if part.second_moment is not None]
    weights = [1.0] * len(grams)
    if layer.base is not None:
        grams.append(layer.base)
        weights.append(settings.preserve)
    return SecondMomentSum(grams, weights, settings.ridge)


def objective(layer: Layer, fused: Factors) -> float:
    """Sum_i E_i|(D - D_i) x|^2 of a fused update D."""
    return sum(
        output_energy(
            stack([fused, Factors(-part.factors.up, part.factors.down)]), part.second_moment
        )
        for part in with_statistics(layer)
        if part.second_moment is not None
    )
