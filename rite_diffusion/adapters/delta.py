"""The weight update of a LoRA pair, as functions of tensors."""

import torch
from torch import Tensor

from rite_diffusion.types import LoraPair


def delta_weight(pair: LoraPair) -> Tensor:
    """Delta W = scale * up @ down, (out, in) or (out, in, k, k); a DoRA's before its norm."""
    product = pair.up.flatten(1) @ pair.down.flatten(1)  # (out, in * k * k)
    return pair.scale * product.reshape(len(pair.up), *pair.down.shape[1:])


def adapted_weight(pair: LoraPair, weight: Tensor) -> Tensor:
    """The weight (out, in) or (out, in, k, k) with the whole pair applied.

    W + delta W, or with a magnitude m (Liu et al. 2024, Eq. 5)
    m * (W + delta W) / |W + delta W|, the norm of each output's weights.
    """
    moved = weight + delta_weight(pair).reshape(weight.shape)
    if pair.magnitude is None:
        return moved
    by_output = (-1, *[1] * (weight.ndim - 1))
    return moved * _gains(pair.magnitude, moved).reshape(by_output)


def gains(pair: LoraPair, weight: Tensor) -> Tensor:
    """A DoRA's factors (out,) on the rows of W + delta W: m / |W + delta W|."""
    assert pair.magnitude is not None
    full = weight.detach().float()
    delta = delta_weight(pair).to(full)
    return _gains(pair.magnitude.to(full), full + delta.reshape(full.shape))


def _gains(magnitude: Tensor, moved: Tensor) -> Tensor:
    norm = torch.linalg.norm(moved.flatten(1), dim=1)
    return torch.where(norm > 0, magnitude / norm, 1.0)  # a row of zeros stays zero


def relative_difference(found: Tensor, wanted: Tensor) -> float:
    """|found - wanted| / |wanted| in Frobenius norms; 0 where both are zero."""
    error, size = torch.linalg.norm(found - wanted), torch.linalg.norm(wanted)
    if size == 0:
        return float(error > 0)
    return float(error / size)
