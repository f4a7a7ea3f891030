"""LoRA-RITE: the transformation-invariant optimizer of LoRA pairs (Yen et al., arXiv 2410.20625).

A product up @ down has infinitely many factorisations. The steps of LoRA-RITE change the product in
the same way for all of them: gradients are expressed in an orthonormal basis of the other factor's
column space, where an r x r matrix preconditions them, and the moments are transformed from each
step's basis to the next one's.

Write X for one factor as rows (m, r), that is down^T or up, and Y for its partner. The basis is
Y W, with an r x r matrix W. Any W with (Y W)^T (Y W) = I gives the same steps; the cheapest is the
inverse Cholesky factor of Y^T Y. The moments are transformed by

    P = (Y_t W_t)^T (Y_{t-1} W_{t-1}) = (H W_t)^T,    H = (Y_{t-1} W_{t-1})^T Y_t,

and the r x r matrix H can be computed at the end of step t-1, so no basis is stored. The state is
the momentum M and two r x r matrices per factor, less than AdamW's two moments. X moves by M W^T.

P is a product of two matrices with orthonormal columns, so its singular values are at most 1. Where
Y is nearly rank-deficient, rounding errors would make them larger, step after step: there H is
computed in float64 and P is replaced by the nearest contraction.
"""

import warnings
from typing import Any

import torch
from torch import Tensor

from rite_diffusion.optim.basis import in_threads, precise
from rite_diffusion.optim.factors import Stack, module_of
from rite_diffusion.optim.lora_optimizer import LoraOptimizer
from rite_diffusion.optim.sides import (
    Side,
    batches_of,
    by_side,
    pairs_of,
    partners,
    step_transforms,
    unmagnify,
)
from rite_diffusion.optim.spec import OptimizerSpec


class LoraRite(LoraOptimizer):
    """LoRA-RITE (Yen et al. 2024, Alg. 1), following the authors' released code.

    The paper sums second moments, for its proof. The released code averages them with
    bias-corrected decay and divides them by the number of rows; it bounds the norm of all
    unmagnified gradients together, sets a factor's gradient to zero if its root mean square is
    above a bound, and leaves the escaped mass out. The last three are options here, with the
    release's defaults. Unlike in both, `down` moves less along directions in which the product is
    smaller than a step, so that both factors' steps together stay bounded (`damped`).

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
            A warning says so once.
        escape: add the mass that the second moment loses when the basis changes (Sec. 3.3).
        core_damping: damps the step of `down` where the product has singular values below a step's,
            times this number; 0: none, as in the release.
        lr_other: AdamW's rate for parameters that are not LoRA factors; None: `lr`.
    """

    _warned = False  # of gradients above `skip_rms`

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
        core_damping: float = 1.0,
        lr_other: float | None = None,
    ):
        settings = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        settings |= dict(clip_unmagnified=clip_unmagnified, skip_rms=skip_rms)
        settings |= dict(escape=escape, core_damping=core_damping)
        super().__init__(params, settings | {"lr_other": lr_other})

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
        skipped = [message for side in sides if (message := skip_large(side))]
        if skipped and not self._warned:
            self._warned = True
            warnings.warn(skipped[0], stacklevel=2)
        squares = [side.square_norm for side in sides]
        norm = torch.stack([s.to(squares[0].device) for s in squares]).sum().sqrt() if sides else 0
        for batch in batches:
            move(batch, norm)
        return [[down.values, up.values] for down, up in zip(sides[::2], sides[1::2], strict=True)]


def new_state(values: Tensor, rank: int, escape: bool) -> dict[str, Tensor]:
    """State of one factor before its first step."""
    n, r = len(values), rank
    square = values.new_zeros(n, r, r)
    state = {
        "momentum": torch.zeros_like(values),  # M, in the partner's basis
        "second": square,  # V, in the partner's basis
        "overlap": square.clone(),  # H = (X_{t-1} W_{t-1})^T X_t of this factor
    }
    return state | ({"escaped": values.new_zeros(n)} if escape else {})


def skip_large(side: Side) -> str:
    """Set unmagnified gradients with a root mean square above `skip_rms` to zero.

    Returns a warning that names the first such pair; empty without one.
    """
    bound = side.stack.group["skip_rms"]
    if not bound:
        return ""
    squares = side.outer.diagonal(dim1=-2, dim2=-1).mean(-1)
    keep = squares <= bound**2
    if keep.all():
        return ""
    side.gradient = side.gradient * keep[:, None, None]
    side.outer = side.outer * keep[:, None, None]
    first = int(keep.int().argmin())
    return (
        f"{module_of(side.stack.names[first])}: an unmagnified gradient has a root mean square of "
        f"{squares[first].sqrt().item():.3g}, above skip_rms = {bound:g}, and counts as zero, as "
        "will others without this warning. A pair does not learn where all its gradients are so: "
        "average the loss instead of summing it, or pass skip_rms=0"
    )


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
    outer = torch.cat([side.outer for side in batch])
    transform = basis_change(other)  # P
    second = torch.cat([side.state["second"] for side in batch])
    transformed = transform @ second @ transform.mT
    escaped = carry_escaped(batch, second, transformed, beta2) if group["escape"] else None
    second = beta2 * transformed + outer * (scale**2 * (1 - beta2))
    second = (second + second.mT) / 2
    root = inverse_root(second, escaped, group["eps"]) * (scale * (1 - beta1))
    keep = 1 - group["lr"] * group["weight_decay"]
    matrices = [by_side(each, batch) for each in (second, root, transform.mT)]
    # up, preconditioned, has singular values of sqrt(m) at most, down of sqrt(n)
    sizes = [group["lr"] * min(side.length, other.length) ** 0.5 for side, other in pairs_of(batch)]
    steps = step_transforms(batch, [group["core_damping"] * size for size in sizes])
    for side, v, a, c, e in zip(batch, *matrices, steps, strict=True):
        momentum = side.times(side.state["momentum"], c)
        side.add_times(momentum, side.gradient, a, beta1)
        old = side.values
        side.values = side.add_times(old.clone(), momentum, e * -group["lr"], keep)
        written = side.values.to(side.stack.parts[0][0].dtype).to(old.dtype)
        new = {"momentum": momentum, "second": v}
        side.state.update(new, overlap=overlap_of(side, old, written))


def basis_change(other: list[Side]) -> Tensor:
    """P (all pairs, r, r) of the sides' partners: the last step's basis in today's."""
    overlap = torch.cat([side.state["overlap"] for side in other])
    transform = (overlap @ torch.cat([side.basis for side in other])).mT
    for side, own in zip(other, by_side(transform, other), strict=True):
        if len(side.ill_conditioned):
            own[side.ill_conditioned] = nearest_contraction(own[side.ill_conditioned])
    return transform


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


RITE = OptimizerSpec(LoraRite, lr=1e-3)
