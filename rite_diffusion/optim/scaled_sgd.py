"""Scaled SGD: gradient descent on LoRA pairs in a Riemannian metric (arXiv 2402.02347)."""

from typing import Any

import torch
from torch import Tensor

from rite_diffusion.optim.factors import Stack
from rite_diffusion.optim.lora_optimizer import LoraOptimizer
from rite_diffusion.optim.riemannian import riemannian_gradient
from rite_diffusion.optim.spec import OptimizerSpec


class ScaledSGD(LoraOptimizer):
    """SGD on the Riemannian gradient of each pair (Zhang & Pilanci 2024, Sec. 3, "scaled GD").

    With damping 0 the products up @ down do not depend on how a product is split into factors.

    Args:
        params: named parameters, such as `lora_param_groups(model)`.
        lr: learning rate.
        momentum: of the Riemannian gradient; the paper uses none.
        weight_decay: decoupled, on the factors.
        damping: added to the diagonal of the r x r Gram matrices (the paper's delta).
        betas: of AdamW, which updates parameters that are not LoRA factors.
        eps: of that AdamW.
        lr_other: learning rate of that AdamW; None: `lr`, which is too high for most.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        damping: float = 1e-6,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        lr_other: float | None = 1e-3,
    ):
        settings = dict(lr=lr, momentum=momentum, weight_decay=weight_decay, damping=damping)
        super().__init__(params, settings | dict(betas=betas, eps=eps, lr_other=lr_other))

    def update_pairs(
        self, stacks: list[Stack], values: list[list[Tensor]], gradients: list[list[Tensor]]
    ) -> list[list[Tensor]]:
        """X <- (1 - lr wd) X - lr (momentum of) the Riemannian gradient."""
        return [self._update(*stack) for stack in zip(stacks, values, gradients, strict=True)]

    def _update(self, stack: Stack, values: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
        group = stack.group
        directions = riemannian_gradient(stack, values, gradients)
        if group["momentum"]:
            directions = self._momentum(stack, directions)
        keep = 1 - group["lr"] * group["weight_decay"]
        return [
            torch.add(value * keep, direction, alpha=-group["lr"])
            for value, direction in zip(values, directions, strict=True)
        ]

    def _momentum(self, stack: Stack, directions: list[Tensor]) -> list[Tensor]:
        if not stack.state:
            stack.state = [{"momentum": direction.clone()} for direction in directions]
        else:
            for state, direction in zip(stack.state, directions, strict=True):
                state["momentum"].mul_(stack.group["momentum"]).add_(direction)
        return [state["momentum"] for state in stack.state]


SCALED_SGD = OptimizerSpec(ScaledSGD, lr=0.3)
