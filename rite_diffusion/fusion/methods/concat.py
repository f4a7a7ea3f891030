"""The sum of all updates, by concatenated factors."""

from rite_diffusion.fusion.layer import Factors, Layer, stack
from rite_diffusion.fusion.settings import FusionSettings


def concat(layer: Layer, settings: FusionSettings) -> Factors:
    """Sum_i w_i D_i exactly, of the sum of the ranks."""
    return stack([part.factors for part in layer.parts])
