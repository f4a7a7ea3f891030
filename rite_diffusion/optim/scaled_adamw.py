"""Scaled AdamW: AdamW on the Riemannian gradient of LoRA pairs (arXiv 2402.02347)."""

from typing import Any

from torch import Tensor

from rite_diffusion.optim.factors import Stack
from rite_diffusion.optim.lora_optimizer import LoraOptimizer, adamw_step
from rite_diffusion.optim.riemannian import riemannian_gradient
from rite_diffusion.optim.spec import OptimizerSpec


class ScaledAdamW(LoraOptimizer):
    """AdamW on the Riemannian gradient (Zhang & Pilanci 2024, "scaled AdamW").

    Both preconditioners use the factors before the step. Unlike scaled SGD it depends on how a
    product is split into factors, because the second moment is elementwise.

    Args:
        params: named parameters, such as `lora_param_groups(model)`.
        lr: learning rate.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled.
        damping: added to the diagonal of the r x r Gram matrices (the paper's delta).
        lr_other: AdamW's rate for parameters that are not LoRA factors; None: `lr`.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        damping: float = 1e-6,
        lr_other: float | None = None,
    ):
        settings = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, damping=damping)
        super().__init__(params, settings | {"lr_other": lr_other})

    def update_pairs(
        self, stacks: list[Stack], values: list[list[Tensor]], gradients: list[list[Tensor]]
    ) -> list[list[Tensor]]:
        """New values after AdamW's step with preconditioned gradients."""
        for stack, value, gradient in zip(stacks, values, gradients, strict=True):
            adamw_step(stack, value, riemannian_gradient(stack, value, gradient))
        return values


SCALED_ADAMW = OptimizerSpec(ScaledAdamW, lr=3e-3)
