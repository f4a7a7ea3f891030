"""The sum of all updates, at its true rank."""

from rite_diffusion.fusion.layer import Factors, Layer, stack
from rite_diffusion.fusion.low_rank import to_true_rank
from rite_diffusion.fusion.settings import FusionSettings


def weighted(layer: Layer, settings: FusionSettings) -> Factors:
    """Sum_i w_i D_i exactly, at its true rank, which is lower where adapters share directions."""
    return to_true_rank(stack([part.factors for part in layer.parts]))
