"""One layer of a fusion: what each concept adds to it, and what flows into it there.

Everything is flat: a convolution's kernel (in, k, k) is a vector of in * k * k inputs, as it is
for `torch.nn.functional.unfold`.
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
    """One concept's share in a layer: its update, its weight included, and its inputs."""

    concept: str  # hash of the adapter's tensors
    factors: Factors  # of rank 0 where the adapter leaves the layer alone
    second_moment: AnySecondMoment | None  # None: no statistics


@dataclass(frozen=True)
class Layer:
    """All concepts' parts in one layer, in an order that no permutation of them changes."""

    name: str
    parts: list[Part]
    base: AnySecondMoment | None  # what flows in where the base model draws ordinary things

    @property
    def rank(self) -> int:
        """Sum of the parts' ranks."""
        return sum(part.factors.rank for part in self.parts)


def flat(pair: LoraPair, weight: float) -> Factors:
    """The pair's update times a weight; scale and weight go into `down`.

    FusionError for a DoRA: its update takes the base's weight, and `as_plain` makes it.
    """
    if pair.magnitude is not None:
        raise FusionError(f"{pair.name} is a DoRA, whose update takes the base: use `rite fuse`.")
    down = pair.down.detach().double().flatten(1)
    return Factors(pair.up.detach().double().flatten(1), pair.scale * weight * down)


def zero_update(like: Factors) -> Factors:
    """The update of rank 0 for the same weight."""
    return Factors(like.up[:, :0], like.down[:0])


def stack(parts: list[Factors]) -> Factors:
    """The sum of updates, exactly: (B_1 … B_n) (A_1; …; A_n)."""
    return Factors(torch.cat([p.up for p in parts], 1), torch.cat([p.down for p in parts]))


def as_pair(name: str, factors: Factors, kernel: torch.Size) -> LoraPair:
    """A LoRA pair of scale 1 for weights (out, *kernel): (in,) or (in, k, k)."""
    down = factors.down.reshape(factors.rank, *kernel).float()
    up = factors.up.float()
    return LoraPair(name, down, up[:, :, None, None] if len(kernel) == 3 else up, 1.0)


def output_energy(factors: Factors, moment: AnySecondMoment) -> float:
    """E|D x|^2 of an update D = up @ down over the inputs of a Gram: tr(D G D^T)."""
    inner = moment.times(factors.down) @ factors.down.mT  # (r, r)
    return ((factors.up.mT @ factors.up) * inner).sum().clamp(min=0).item()
