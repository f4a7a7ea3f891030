"""The sum of all updates, limited to a rank or to an error."""

from rite_diffusion.errors import FusionError
from rite_diffusion.fusion.layer import Factors, Layer, stack
from rite_diffusion.fusion.low_rank import to_error, to_rank
from rite_diffusion.fusion.settings import FusionSettings


def svd(layer: Layer, settings: FusionSettings) -> Factors:
    """Sum_i w_i D_i; `cut_to_error` limits its rank. FusionError without a rank or an error."""
    if settings.error is None and settings.rank is None:
        raise FusionError("svd needs a rank or an error: pass --rank 8, or --set error=0.1.")
    return stack([part.factors for part in layer.parts])


def cut_to_error(layer: Layer, fused: Factors, settings: FusionSettings) -> Factors:
    """The nearest update within `settings.error`, relative Frobenius, and of `settings.rank`."""
    if settings.error is not None:
        fused = to_error(fused, settings.error)
    return fused if settings.rank is None else to_rank(fused, settings.rank)
