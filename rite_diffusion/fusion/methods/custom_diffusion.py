"""The constrained merge of Custom Diffusion (Kumari et al. 2023, arXiv 2212.04488), for any layer.

    minimise E_0|D x|^2   such that   D c = D_i c   for the chosen inputs c of every concept i

The paper states it for the full weights of keys and values, with the text states of each concept's
words as c and those of regularisation captions as x; subtracting the base's weights gives the form
above. Here E_0 is over the base model's inputs, and c are the directions in which the concept's
inputs exceed the base's most.
"""

import torch
from torch import Tensor

from rite_diffusion.errors import FusionError
from rite_diffusion.fusion.layer import Factors, Layer
from rite_diffusion.fusion.methods.gram import with_statistics
from rite_diffusion.fusion.second_moments import AnySecondMoment, SecondMoment
from rite_diffusion.fusion.settings import FusionSettings

COLLINEAR = 1e-3  # singular values of the constraints below this share of the largest are dropped


def custom_diffusion(layer: Layer, settings: FusionSettings) -> Factors:
    """The minimiser above, of the sum of the ranks.

    With G_0 + ridge I = R^2, whitened inputs z = R^-1 x and constraints C (s, inputs), one row per
    direction: D R = T pinv(C^T), T = [D_i R C_i^T].
    """
    if layer.base is None:
        raise FusionError(
            f"no sketch has the base's statistics for {layer.name}: make the sketches again."
        )
    base, ridge = layer.base.spectral, settings.ridge * layer.base.trace / layer.base.width
    parts = with_statistics(layer)
    count = min(settings.constraints, max(1, base.width // (2 * len(parts))))
    white = [
        distinct_directions(part.second_moment, base, ridge, count)
        for part in parts
        if part.second_moment is not None
    ]
    blocks = [
        base.power(part.factors.down, 0.5, ridge) @ directions.mT  # (r_i, s_i)
        for part, directions in zip(parts, white, strict=True)
    ]
    inverse = torch.linalg.pinv(torch.cat(white).mT, rtol=COLLINEAR)  # (s, inputs)
    down = torch.block_diag(*blocks) @ base.power(inverse, -0.5, ridge)
    return Factors(torch.cat([part.factors.up for part in parts], 1), down)


def distinct_directions(
    moment: AnySecondMoment, base: SecondMoment, ridge: float, count: int
) -> Tensor:
    """The `count` leading directions (s, inputs) of a concept's whitened inputs, orthonormal."""
    whitened = base.power(moment.spectral.root(), -0.5, ridge)
    return torch.linalg.svd(whitened, full_matrices=False).Vh[:count]
