"""LoRA-RITE: the transformation-invariant optimizer of LoRA pairs (Yen et al., arXiv 2410.20625).

A product up @ down has infinitely many factorisations. The steps of LoRA-RITE change the product in
the same way for all of them: gradients are expressed in an orthonormal basis of the other factor's
column space, where an r x r matrix preconditions them, and the moments are transformed from each
step's basis to the next one's.

Write X for one factor as rows (m, r), that is down^T or up, and Y for its partner. The basis is
Y W, with an r x r matrix W. Any W with (Y W)^T (Y W) = I gives the same steps; the cheapest is the
inverse Cholesky factor of Y^T Y. The moments are transformed by

    P = (Y_t W_t)^T (Y_{t-1} W_{t-1}) = (H W_t)^T,    H = (Y_{t-1} W_{t-1})^T Y_t,

and the r x r matrix H can be computed at the end of step t-1, so no basis is stored. The momentum
M is stored as it is applied, N = M W^T, and transformed to N W_{t-1}^{-T} P^T W_t^T. The state is
this momentum and three r x r matrices per factor, less than AdamW's two moments.

P is a product of two matrices with orthonormal columns, so its singular values are at most 1. Where
Y is nearly rank-deficient, rounding errors would make them larger, step after step: there H is
computed in float64 and P is replaced by the nearest contraction.
"""

from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rite_diffusion.optim.factors import Stack
from rite_diffusion.optim.lora_optimizer import LoraOptimizer
from rite_diffusion.optim.spec import OptimizerSpec

WELL_CONDITIONED = 1e-2  # least ratio of Cholesky pivots at which float32 is enough for the basis


class LoraRite(LoraOptimizer):
    """LoRA-RITE (Yen et al. 2024, Alg. 1), following the authors' released code.

    The paper sums second moments, for its proof. The released code averages them with
    bias-corrected decay and divides them by the number of rows; it bounds the norm of all
    unmagnified gradients together, sets a factor's gradient to zero if its root mean square is
    above a bound, and leaves the escaped mass out. The last three are options here, with the
    release's defaults. Unlike in both, a factor does not move along directions in which its partner
    nearly vanishes (`svd_basis`).

    Only this optimizer should change the parameters between steps: after any other change, the
    moments are transformed to a wrong basis.

    Args:
        params: named parameters, such as `lora_param_groups(model)`.
        lr: learning rate, of a step in the product's space.
        betas: decay rates of the momentum and of the second moment.
        eps: added to the root of the second moment's eigenvalues.
        weight_decay: decoupled, on the factors.
        clip_unmagnified: bound on the norm of all pairs' unmagnified gradients together; 0: none.
        skip_rms: unmagnified gradients of a larger root mean square are set to zero; 0: none.
        escape: add the mass that the second moment loses when the basis changes (Sec. 3.3).
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        clip_unmagnified: float = 1.0,
        skip_rms: float = 1.0,
        escape: bool = False,
    ):
        settings = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        settings |= dict(clip_unmagnified=clip_unmagnified, skip_rms=skip_rms, escape=escape)
        super().__init__(params, settings)

    def update_pairs(
        self, stacks: list[Stack], values: list[list[Tensor]], gradients: list[list[Tensor]]
    ) -> list[list[Tensor]]:
        """New values of all pairs; the norm is clipped over all of them together."""
        sides: list[Side] = []
        for stack, value, gradient in zip(stacks, values, gradients, strict=True):
            if not stack.state:
                rank, escape = value[0].shape[1], stack.group["escape"]
                stack.state = [new_state(v, rank, escape) for v in value]
            sides += [Side(stack, part, value[part], gradient[part]) for part in range(2)]
        batches = batches_of(sides)
        for batch in batches:
            unmagnify(batch)
        squares = [side.square_norm for side in sides]
        norm = torch.stack([s.to(squares[0].device) for s in squares]).sum().sqrt() if sides else 0
        for batch in batches:
            move(batch, norm)
        return [[down.values, up.values] for down, up in zip(sides[::2], sides[1::2], strict=True)]


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

    def add_times(self, total: Tensor, rows: Tensor, matrix: Tensor, keep: float) -> None:
        """Update in place: total <- keep total + rows matrix."""
        left, right = (matrix.mT, rows) if self.part == 0 else (rows, matrix)
        total.baddbmm_(left, right, beta=keep)

    @property
    def square_norm(self) -> Tensor:
        """Squared norm of the unmagnified gradients of all pairs together."""
        return self.outer.diagonal(dim1=-2, dim2=-1).sum() * self.length


def new_state(values: Tensor, rank: int, escape: bool) -> dict[str, Tensor]:
    """State of one factor before its first step."""
    n, r = len(values), rank
    square = values.new_zeros(n, r, r)
    state = {
        "momentum": torch.zeros_like(values),  # N = M W^T, as it is applied
        "second": square,  # V, in the partner's basis
        "back": square.clone(),  # W_{t-1}^{-T} of this factor
        "overlap": square.clone(),  # H = (X_{t-1} W_{t-1})^T X_t of this factor
    }
    return state | ({"escaped": values.new_zeros(n)} if escape else {})


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


def partners(batch: list[Side]) -> list[Side]:
    """Each side's partner."""
    pairs = zip(batch[::2], batch[1::2], strict=True)
    return [side for down, up in pairs for side in (up, down)]


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
        skip_large(side)


def cholesky_basis(grams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """W and W^{-T} (n, r, r) from Gram matrices by Cholesky; and where (n,) they are inaccurate."""
    factor, failed = torch.linalg.cholesky_ex(grams, upper=True)
    pivots = factor.diagonal(dim1=-2, dim2=-1)
    inaccurate = (failed != 0) | ~(pivots.amin(-1) > WELL_CONDITIONED * pivots.amax(-1))
    identity = torch.eye(grams.shape[-1], dtype=grams.dtype, device=grams.device)
    factor = torch.where(inaccurate[:, None, None], identity, factor)
    basis = torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=True)
    return basis, factor.mT.contiguous(), inaccurate


def svd_basis(rows: Tensor) -> tuple[Tensor, Tensor]:
    """W and W^{-T} of rows (n, m, r) by singular values, for any condition number and rank.

    Directions with singular values below sqrt(eps) times the largest are left out, as in a
    pseudo-inverse; zero rows give zero. Along such a direction, which is mostly rounding error, the
    partner would take a full step: its entries would be as large as this factor's are small, and
    would multiply this factor's own step.
    """
    _, sizes, right = torch.linalg.svd(torch.linalg.qr(precise(rows), mode="r")[1])  # X = U S right
    sizes = F.pad(sizes, (0, rows.shape[-1] - sizes.shape[-1]))  # fewer rows than the rank: m < r
    smallest = torch.finfo(rows.dtype).eps ** 0.5 * sizes[:, :1]
    kept = sizes > smallest
    inverse = torch.where(kept, 1 / sizes.where(kept, 1.0), 0.0)
    sizes = sizes.where(kept, 0.0)
    return tuple((right.mT * each[:, None, :]).to(rows.dtype) for each in (inverse, sizes))


def precise(values: Tensor) -> Tensor:
    """The values in float64; unchanged on mps, which has none."""
    return values if values.device.type == "mps" else values.double()


def skip_large(side: Side) -> None:
    """Set unmagnified gradients with a root mean square above `skip_rms` to zero."""
    bound = side.stack.group["skip_rms"]
    if bound:
        keep = side.outer.diagonal(dim1=-2, dim2=-1).mean(-1) <= bound**2
        if not keep.all():
            side.gradient = side.gradient * keep[:, None, None]
            side.outer = side.outer * keep[:, None, None]


def corrected(beta: float, step: int) -> float:
    """The decay of a bias-corrected moving average at a step; 0 at the first, step 1."""
    return beta * (1 - beta ** (step - 1)) / (1 - beta**step)


def move(batch: list[Side], norm: Tensor | float) -> None:
    """Compute new values and state of a batch (Alg. 1)."""
    group, step = batch[0].stack.group, batch[0].stack.step
    beta1, beta2 = (corrected(beta, step) for beta in group["betas"])
    bound = group["clip_unmagnified"]
    scale = (bound / norm).clamp(max=1).to(batch[0].values) if bound else 1.0
    other = partners(batch)
    basis = torch.cat([side.basis for side in other])
    overlap = torch.cat([side.state["overlap"] for side in other])
    back = torch.cat([side.state["back"] for side in other])
    outer = torch.cat([side.outer for side in batch])
    transform = (overlap @ basis).mT  # P
    for partner, own in zip(other, by_side(transform, batch), strict=True):
        if len(partner.ill_conditioned):
            own[partner.ill_conditioned] = nearest_contraction(own[partner.ill_conditioned])
    second = torch.cat([side.state["second"] for side in batch])
    transformed = transform @ second @ transform.mT
    escaped = carry_escaped(batch, second, transformed, beta2) if group["escape"] else None
    second = beta2 * transformed + outer * (scale**2 * (1 - beta2))
    second = (second + second.mT) / 2
    root = inverse_root(second, escaped, group["eps"])
    apply = root @ basis.mT * (scale * (1 - beta1))
    carry = back @ (basis @ transform).mT
    keep = 1 - group["lr"] * group["weight_decay"]
    for side, v, a, c in zip(
        batch, by_side(second, batch), by_side(apply, batch), by_side(carry, batch), strict=True
    ):
        momentum = side.times(side.state["momentum"], c)
        side.add_times(momentum, side.gradient, a, beta1)
        old = side.values
        side.values = torch.add(old if keep == 1 else old * keep, momentum, alpha=-group["lr"])
        written = side.values.to(side.stack.parts[0][0].dtype).to(old.dtype)
        new = {"momentum": momentum, "second": v, "back": side.back}
        side.state.update(new, overlap=overlap_of(side, old, written))


def nearest_contraction(matrices: Tensor) -> Tensor:
    """The nearest matrices (n, r, r) with singular values of at most 1."""
    left, sizes, right = torch.linalg.svd(matrices)
    return left * sizes.clamp(max=1)[:, None, :] @ right


def overlap_of(side: Side, old: Tensor, new: Tensor) -> Tensor:
    """H = (X W)^T X' (n, r, r) of a factor's old and new values."""
    overlap = side.basis.mT @ side.products(old, new)
    bad = side.ill_conditioned
    if len(bad):
        before, after = (precise(side.rows(each[bad])) for each in (old, new))
        overlap[bad] = ((before @ precise(side.basis[bad])).mT @ after).to(overlap)
    return overlap


def carry_escaped(batch: list[Side], second: Tensor, transformed: Tensor, beta2: float) -> Tensor:
    """The escaped mass (n,), with that of this step's change of basis; also put into the state."""
    past = torch.cat([side.state["escaped"] for side in batch])
    escaped = beta2 * (past + escaped_mass(second, transformed))
    for side, own in zip(batch, by_side(escaped, batch), strict=True):
        side.state["escaped"] = own
    return escaped


def inverse_root(second: Tensor, escaped: Tensor | None, eps: float) -> Tensor:
    """(second + escaped I)^(-1/2) of symmetric matrices (n, r, r), with eps added to the roots."""
    values, vectors = in_threads(torch.linalg.eigh, second)
    values = values.clamp(min=0)
    if escaped is not None:
        values = values + escaped[:, None]
    sizes = 1 / ((values + eps**2).sqrt() + eps)
    return (vectors * sizes[:, None, :]) @ vectors.mT


def escaped_mass(before: Tensor, after: Tensor) -> Tensor:
    """Second moment (n,) lost by the change of basis (Sec. 3.3; the smaller of two bounds)."""
    gaps = torch.linalg.eigvalsh(before) - torch.linalg.eigvalsh(after)
    lost = (before - after).diagonal(dim1=-2, dim2=-1).sum(-1)
    return torch.minimum(gaps.amax(-1).clamp(min=0), lost.clamp(min=0))


def in_threads(function: Callable[[Tensor], Any], matrices: Tensor) -> tuple[Tensor, ...]:
    """A batched decomposition, in threads on a CPU, where PyTorch uses only one core for it."""
    threads = torch.get_num_threads()
    if matrices.device.type != "cpu" or threads == 1 or matrices[..., 0].numel() < 2000:
        return tuple(function(matrices))
    parts = list(_pool(threads).map(function, matrices.chunk(threads)))
    return tuple(torch.cat(each) for each in zip(*parts, strict=True))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="decompose")


RITE = OptimizerSpec(LoraRite, lr=1e-3)
