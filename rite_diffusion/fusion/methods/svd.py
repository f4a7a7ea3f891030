"""The sum of all updates, cut to a rank or to an error."""

from rite_diffusion.errors import FusionError
from rite_diffusion.fusion.layer import Factors, Layer, stack
from rite_diffusion.fusion.low_rank import to_error, to_rank
from rite_diffusion.fusion.settings import FusionSettings


def svd(layer: Layer, settings: FusionSettings) -> Factors:
    """The nearest update to Sum_i w_i D_i of a rank, or within a relative Frobenius error."""
    total = stack([part.factors for part in layer.parts])
    if settings.error is not None:
        return to_error(total, settings.error)
    if settings.rank is None:
        raise FusionError("svd needs a rank or an error: pass --rank 8, or --set error=0.1.")
    return to_rank(total, settings.rank)
