"""LoRA-Muon: spectral steepest descent on LoRA pairs (Cesista et al. 2026, arXiv 2606.12921)."""

from typing import Any

import torch
from torch import Tensor

from rite_diffusion.errors import OptimizerError
from rite_diffusion.optim.basis import in_threads
from rite_diffusion.optim.factors import Stack
from rite_diffusion.optim.lora_optimizer import LoraOptimizer
from rite_diffusion.optim.sides import (
    Side,
    batches_of,
    by_side,
    pairs_of,
    step_transforms,
    unmagnify,
)
from rite_diffusion.optim.spec import OptimizerSpec


class LoraMuon(LoraOptimizer):
    """LoRA-Muon (Cesista et al. 2026): Muon's update of the product, half of it by each factor.

    With rows X (m, r) of one factor, Y of its partner, and the moving average M of X's gradient,

        R = (Y^T Y)^(-1/2),    X <- s X - lr / (2 s) msign(M R) R,    s = sqrt(1 - lr wd),

    where msign sets all singular values to 1: both factors together change the product by a
    spectral norm of up to `lr`, and s decays the product. The steps do not depend on how the
    product is split into factors, and the only state is M. Any R with (Y R)^T (Y R) = I gives the
    same steps; it is taken from a Cholesky factor, and msign from the eigenvalues of r x r
    matrices, where the paper has Newton-Schulz iterations.

    Two things are added. Singular values that are small beside the largest, such as rounding where
    the gradient's rank is below r, are not raised to 1 (`sign_eps`). `down` moves less where the
    product is smaller than a step (`core_damping`), as in `LoraRite`.

    Args:
        params: named parameters, such as `lora_param_groups(model)`.
        lr: spectral norm of a step of the product.
        momentum: decay of the gradients' moving average.
        weight_decay: of the product.
        sign_eps: singular values sigma become sigma / sqrt(sigma^2 + (sign_eps largest)^2).
        core_damping: damps the step of `down` where the product has singular values below a
            factor's step, lr / 2, times this number; 0: none, as in the paper.
        betas: of AdamW, which updates parameters that are not LoRA factors.
        eps: of that AdamW.
        lr_other: learning rate of that AdamW; None: `lr`, which is too high for most.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 0.01,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        sign_eps: float = 1e-3,
        core_damping: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        lr_other: float | None = 1e-3,
    ):
        settings = dict(lr=lr, momentum=momentum, weight_decay=weight_decay, sign_eps=sign_eps)
        settings |= dict(core_damping=core_damping, eps=eps, lr_other=lr_other)
        super().__init__(params, settings | {"betas": betas})

    def update_pairs(
        self, stacks: list[Stack], values: list[list[Tensor]], gradients: list[list[Tensor]]
    ) -> list[list[Tensor]]:
        """New values of all pairs."""
        sides: list[Side] = []
        for stack, value, gradient in zip(stacks, values, gradients, strict=True):
            if not stack.state:
                stack.state = [{"momentum": torch.zeros_like(v)} for v in value]
            for part, state in enumerate(stack.state):
                momentum = state["momentum"].lerp_(gradient[part], 1 - stack.group["momentum"])
                sides.append(Side(stack, part, value[part], momentum))
        for batch in batches_of(sides):
            unmagnify(batch)
            move(batch)
        return [[down.values, up.values] for down, up in pairs_of(sides)]


def move(batch: list[Side]) -> None:
    """Compute new values of a batch, whose gradients are in the bases of their partners."""
    group = batch[0].stack.group
    lr, decay = group["lr"], group["lr"] * group["weight_decay"]
    if decay >= 1:
        raise OptimizerError(f"lr * weight_decay = {decay:g}: must be below 1")
    keep = (1 - decay) ** 0.5
    outer = torch.cat([side.outer * side.length for side in batch])
    roots = by_side(inverse_root(outer, group["sign_eps"]), batch)
    transforms = step_transforms(batch, [group["core_damping"] * lr / 2] * (len(batch) // 2))
    for side, root, transform in zip(batch, roots, transforms, strict=True):
        step = root @ transform * (-lr / (2 * keep))
        side.values = side.add_times(side.values.clone(), side.gradient, step, keep)


def inverse_root(squares: Tensor, sign_eps: float) -> Tensor:
    """(M^T M + (sign_eps largest singular value)^2 I)^(-1/2) (n, r, r), from M^T M."""
    values, vectors = in_threads(torch.linalg.eigh, squares)
    values = values.clamp(min=0)
    floor = sign_eps**2 * values[:, -1:] + torch.finfo(values.dtype).tiny
    return (vectors * (values + floor).rsqrt()[:, None, :]) @ vectors.mT


LORA_MUON = OptimizerSpec(LoraMuon, lr=0.01)
