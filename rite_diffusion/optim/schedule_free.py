"""Schedule-free AdamW (Defazio et al. 2024, arXiv 2405.15682): an average replaces the decay."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from rite_diffusion.errors import OptimizerError
from rite_diffusion.optim.factors import gradient_of
from rite_diffusion.optim.lora_optimizer import check_settings
from rite_diffusion.optim.spec import OptimizerSpec
from rite_diffusion.optim.state import UncastOptimizer, in_float32


class ScheduleFreeAdamW(UncastOptimizer):
    """AdamW at a constant rate with an average x of its iterates z (Algorithm 1).

        y = (1 - b1) z + b1 x    where gradients are taken: the parameters while training
        z <- z - lr (g / (√v + eps) + wd y)
        x <- (1 - c) x + c z,    c = w / sum of w so far,  w = k^r lr_max^p

    x is the result: `eval` sets the parameters to it, and `train` back to y, bit for bit.

    Args:
        params: parameters or groups, named or not.
        lr: rate; a warm-up may raise it, and no decay should lower it.
        betas: b1, the share of x in y, and the decay rate of the second moment v.
        eps: added to the root of the second moment.
        weight_decay: decoupled, computed at y.
        r: power of the step's number in its weight.
        weight_lr_power: p, which gives little weight to steps of a warm-up.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 2.5e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
    ):
        settings = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        check_settings(settings)
        if not betas[0] > 0:
            raise OptimizerError(f"betas = {betas}: the first must be above 0")
        super().__init__(params, settings | dict(r=r, weight_lr_power=weight_lr_power))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every parameter that has a gradient; returns the closure's value.

        OptimizerError after `eval` without `train`.
        """
        if self.is_averaged:
            raise OptimizerError("the parameters hold the average: call the optimizer's train()")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            active = [p for p in group["params"] if p.grad is not None]
            if active:
                self._step(group, active)
        return loss

    def _step(self, group: dict[str, Any], active: list[Tensor]) -> None:
        done, total, most = self.numbers_of(group, [0.0, 0.0, 0.0])
        (beta1, beta2), lr = group["betas"], group["lr"]
        most = max(most, lr)
        weight = (done + 1) ** group["r"] * most ** group["weight_lr_power"]
        total += weight
        share = weight / total if total else 0.0
        values, gradients = in_float32(active), in_float32([gradient_of(p) for p in active])
        for parameter, value in zip(active, values, strict=True):
            if parameter not in self.state:
                self.state[parameter] = {"z": value.clone(), "second": torch.zeros_like(value)}
        z, second = self.part(active, "z"), self.part(active, "second")
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, gradients, gradients, 1 - beta2)
        scales = torch._foreach_sqrt(torch._foreach_div(second, 1 - beta2 ** (done + 1)))
        torch._foreach_add_(scales, group["eps"])
        steps = torch._foreach_div(gradients, scales)
        torch._foreach_add_(steps, values, alpha=group["weight_decay"])
        # y, without x: x' = (1 - c) x + c z', y' = (1 - b1) z' + b1 x'
        values = torch._foreach_lerp(values, z, share)
        torch._foreach_add_(values, steps, alpha=lr * (beta1 * (1 - share) - 1))
        torch._foreach_sub_(z, steps, alpha=lr)
        torch._foreach_copy_(active, values)
        self.keep_numbers(active, [done + 1, total, most])

    @property
    def is_averaged(self) -> bool:
        """Whether the parameters hold the average x."""
        return any("y" in state for state in self.state.values())

    @torch.no_grad()
    def eval(self) -> None:
        """Set the parameters to the average x; y is kept in the state."""
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state.get(parameter, {})
                if "z" in state and "y" not in state:
                    state["y"] = parameter.detach().clone()
                    [value] = in_float32([parameter])
                    parameter.copy_(value.lerp(state["z"], 1 - 1 / group["betas"][0]))

    @torch.no_grad()
    def train(self) -> None:
        """Set the parameters back to y, as they were before `eval`."""
        for parameter, state in self.state.items():
            if "y" in state:
                parameter.copy_(state.pop("y"))


@contextmanager
def averaged(optimizer: Optimizer) -> Iterator[None]:
    """Let a schedule-free optimizer's parameters hold their average until the block ends."""
    if not isinstance(optimizer, ScheduleFreeAdamW):
        yield
        return
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()


ADAMW_SCHEDULE_FREE = OptimizerSpec(
    ScheduleFreeAdamW, lr=2.5e-3, moves_pairs=False, schedule_free=True
)
