"""Both factors of stacked pairs as rows, in bases of their partners, batched over layers' sizes."""

from collections import defaultdict
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rite_diffusion.optim.basis import cholesky_basis, damped, svd_basis, undamped
from rite_diffusion.optim.factors import Stack


@dataclass
class Side:
    """One factor X of a stack of pairs, in the parameters' layout: down (n, r, m) or up (n, m, r).

    `rows`, `times`, `products` and `add_times` treat both layouts as rows (n, m, r).
    """

    stack: Stack
    part: int  # 0: down, 1: up
    values: Tensor
    gradient: Tensor  # after `unmagnify`: in the partner's basis
    basis: Tensor = field(init=False)  # this factor's own W (n, r, r): X W is orthonormal
    back: Tensor = field(init=False)  # W^{-T} (n, r, r)
    ill_conditioned: Tensor = field(init=False)  # indices of nearly rank-deficient pairs
    outer: Tensor = field(init=False)  # gradient^T gradient / m (n, r, r)

    @property
    def state(self) -> dict[str, Tensor]:
        """The stack's state of this factor."""
        return self.stack.state[self.part]

    @property
    def length(self) -> int:
        """m, the number of rows."""
        return self.values.shape[2 - self.part]

    def rows(self, values: Tensor) -> Tensor:
        """Values in this factor's layout as rows (n, m, r)."""
        return values.mT if self.part == 0 else values

    def times(self, rows: Tensor, matrix: Tensor) -> Tensor:
        """Rows times matrices (n, r, r)."""
        return matrix.mT @ rows if self.part == 0 else rows @ matrix

    def products(self, first: Tensor, second: Tensor) -> Tensor:
        """first^T second (n, r, r)."""
        return first @ second.mT if self.part == 0 else first.mT @ second

    def add_times(self, total: Tensor, rows: Tensor, matrix: Tensor, keep: float) -> Tensor:
        """Update in place: total <- keep total + rows matrix; returns it."""
        left, right = (matrix.mT, rows) if self.part == 0 else (rows, matrix)
        return total.baddbmm_(left, right, beta=keep)

    @property
    def square_norm(self) -> Tensor:
        """Squared norm of the unmagnified gradients of all pairs together."""
        return self.outer.diagonal(dim1=-2, dim2=-1).sum() * self.length


def batches_of(sides: list[Side]) -> list[list[Side]]:
    """The sides grouped by rank, step and settings; each stack's down is followed by its up.

    The r x r matrices of a group are processed as one batch, whatever the layers' sizes.
    """
    batches = defaultdict(list)
    for down, up in zip(sides[::2], sides[1::2], strict=True):
        stack = down.stack
        key = id(stack.group), stack.step, down.values.shape[1], stack.dtype, down.values.device
        batches[key] += [down, up]
    return list(batches.values())


def by_side(matrices: Tensor, batch: list[Side]) -> list[Tensor]:
    """Matrices (all pairs of the batch, r, r) divided by side."""
    return list(matrices.split([len(side.values) for side in batch]))


def pairs_of(batch: list[Side]) -> list[tuple[Side, Side]]:
    """(down, up) of each stack of the batch."""
    return list(zip(batch[::2], batch[1::2], strict=True))


def partners(batch: list[Side]) -> list[Side]:
    """Each side's partner."""
    return [side for down, up in pairs_of(batch) for side in (up, down)]


def unmagnify(batch: list[Side]) -> None:
    """Express gradients in the bases of their partners (Sec. 3.1), and set the sides' fields."""
    grams = torch.cat([side.products(side.values, side.values) for side in batch])
    *bases, inaccurate = cholesky_basis(grams)
    some = bool(inaccurate.any())  # the only synchronisation with the device
    for side, *own, mask in zip(
        batch, *(by_side(m, batch) for m in [*bases, inaccurate]), strict=True
    ):
        side.basis, side.back = own
        bad = side.ill_conditioned = (mask if some else mask[:0]).nonzero().squeeze(-1)
        if len(bad):
            side.basis[bad], side.back[bad] = svd_basis(side.rows(side.values[bad]))
    for side, partner in zip(batch, partners(batch), strict=True):
        side.gradient = side.times(side.gradient, partner.basis)
        side.outer = side.products(side.gradient, side.gradient) / side.length


def step_transforms(batch: list[Side], sizes: list[float]) -> list[Tensor]:
    """Per side, the matrices (n, r, r) by which a direction in the partner's basis becomes a step.

    They are W^T of the partner. That of `down` is damped: with `sizes`, per stack, the singular
    values of the smaller of both factors' steps in the product, what both steps add together is at
    most half of the larger step.
    """
    down, up = batch[::2], batch[1::2]
    reach = [
        side.values.new_full((len(side.values),), size)
        for side, size in zip(down, sizes, strict=True)
    ]
    back_down, back_up = (torch.cat([side.back for side in each]) for each in (down, up))
    every = by_side(damped(back_down, back_up, torch.cat(reach)), down)
    transforms = []
    for lower, upper, own in zip(down, up, every, strict=True):
        bad = lower.ill_conditioned
        if len(bad):
            lost = bad[(lower.back[bad] == 0).all(-2).any(-1)]
            own[lost] += undamped(lower.back[lost], upper.back[lost])
        transforms += [own, lower.basis.mT]
    return transforms
