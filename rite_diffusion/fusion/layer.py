"""One layer of a fusion: each concept's update of it, and the statistics of its inputs.

Weights are flat: a convolution's kernel (in, k, k) is a vector of in * k * k inputs, as in
`torch.nn.functional.unfold`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rite_diffusion.errors import FusionError
from rite_diffusion.fusion.second_moments import AnySecondMoment
from rite_diffusion.types import LoraPair


@dataclass(frozen=True)
class Factors:
    """An update of a weight, up @ down: up (out, r), down (r, inputs), float64; r may be 0."""

    up: Tensor
    down: Tensor

    @property
    def rank(self) -> int:
        """Columns of `up`."""
        return self.up.shape[1]

    def dense(self) -> Tensor:
        """The update itself (out, inputs)."""
        return self.up @ self.down


@dataclass(frozen=True)
class Part:
    """One concept's part in a layer: its update, times its weight, and its inputs' statistics."""

    concept: str  # digest of the adapter's tensors
    factors: Factors  # of rank 0 where the adapter does not change the layer
    second_moment: AnySecondMoment | None  # None: no statistics


@dataclass(frozen=True)
class Layer:
    """All concepts' parts in one layer, in an order that does not depend on the user's."""

    name: str
    parts: list[Part]
    base: AnySecondMoment | None  # of the inputs while the base model draws ordinary prompts

    @property
    def rank(self) -> int:
        """Sum of the parts' ranks."""
        return sum(part.factors.rank for part in self.parts)


def flat(pair: LoraPair, weight: float) -> Factors:
    """The pair's update times `weight`; scale and weight are multiplied into `down`.

    FusionError for a DoRA: its update depends on the base's weight, see `as_plain`.
    """
    if pair.magnitude is not None:
        raise FusionError(f"{pair.name} is a DoRA, whose update needs the base: use `rite fuse`.")
    down = pair.down.detach().double().flatten(1)
    return Factors(pair.up.detach().double().flatten(1), pair.scale * weight * down)


def zero_update(like: Factors) -> Factors:
    """An update of rank 0 with the shape of `like`."""
    return Factors(like.up[:, :0], like.down[:0])


def stack(parts: list[Factors]) -> Factors:
    """The exact sum of updates: (B_1 … B_n) (A_1; …; A_n)."""
    return Factors(torch.cat([p.up for p in parts], 1), torch.cat([p.down for p in parts]))


def as_pair(name: str, factors: Factors, kernel: torch.Size) -> LoraPair:
    """A LoRA pair of scale 1; `kernel` is (in,) or (in, k, k) of its weight (out, *kernel)."""
    down = factors.down.reshape(factors.rank, *kernel).float()
    up = factors.up.float()
    return LoraPair(name, down, up[:, :, None, None] if len(kernel) == 3 else up, 1.0)


def output_energy(factors: Factors, moment: AnySecondMoment) -> float:
    """E|D x|^2 of an update D over inputs of second moment G: tr(D G D^T)."""
    inner = moment.times(factors.down) @ factors.down.mT  # (r, r)
    return ((factors.up.mT @ factors.up) * inner).sum().clamp(min=0).item()
