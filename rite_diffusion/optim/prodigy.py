"""Prodigy: Adam that finds its own rate (Mishchenko & Defazio 2023, arXiv 2306.06101)."""

from collections.abc import Callable, Sequence
from math import sqrt
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from rite_diffusion.errors import OptimizerError
from rite_diffusion.optim.factors import gradient_of
from rite_diffusion.optim.lora_optimizer import check_settings
from rite_diffusion.optim.spec import OptimizerSpec
from rite_diffusion.optim.state import UncastOptimizer, in_float32


class Prodigy(UncastOptimizer):
    """Adam whose rate is `lr` times d, an estimate of the distance from start to solution.

    Algorithm 4 of the paper, as released:

        d_hat = d_coef r / |s|_1,  r <- b3 r + d lr <g, x_0 - x>,  s <- b3 s + d lr g

    and d is the largest d_hat so far. Each parameter group has a d of its own, where the release
    has one for all. Bias correction and `safeguard_warmup`, which the release leaves off, are on,
    as usual in training LoRA. Leave `lr` at 1; a schedule may lower it.

    A group with `rate_free` = False has no estimate: it is AdamW's, with the group's own `lr`.

    Args:
        params: parameters or groups, named or not.
        lr: multiplies d.
        betas: decay rates of the two moments.
        beta3: decay of r and s; None: the root of the second of `betas`.
        eps: added to the root of the second moment, times d.
        weight_decay: decoupled.
        d0: first d, to be far below the distance.
        d_coef: multiplies d_hat; 0.5 and 2 are usual.
        growth_rate: most by which d grows in a step.
        use_bias_correction: of the moments.
        safeguard_warmup: leave `lr` out of s, so that a warm-up does not make d_hat too large.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        beta3: float | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        d0: float = 1e-6,
        d_coef: float = 1.0,
        growth_rate: float = float("inf"),
        use_bias_correction: bool = True,
        safeguard_warmup: bool = True,
    ):
        settings = dict(lr=lr, betas=betas, beta3=beta3, eps=eps, weight_decay=weight_decay)
        settings |= dict(d0=d0, d_coef=d_coef, growth_rate=growth_rate, rate_free=True)
        flags = dict(use_bias_correction=use_bias_correction, safeguard_warmup=safeguard_warmup)
        if not 0 < d0 < float("inf") or not growth_rate > 1:
            raise OptimizerError(f"d0 = {d0}, growth_rate = {growth_rate}: not above 0 and 1")
        check_settings(settings)
        super().__init__(params, settings | flags)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every parameter that has a gradient; returns the closure's value."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            active = [p for p in group["params"] if p.grad is not None]
            if active and group["lr"] > 0:
                step = self._step if group["rate_free"] else self._adamw_step
                step(group, active)
        return loss

    def _step(self, group: dict[str, Any], active: list[Tensor]) -> None:
        """A step of a group whose rate is found."""
        d0, (beta1, beta2) = group["d0"], group["betas"]
        d, most, numerator, done = self.numbers_of(group, [d0, d0, 0.0, 0.0])
        beta3 = sqrt(beta2) if group["beta3"] is None else group["beta3"]
        rate = d * group["lr"]
        if group["use_bias_correction"]:
            rate *= sqrt(1 - beta2 ** (done + 1)) / (1 - beta1 ** (done + 1))
        values, gradients = in_float32(active), in_float32([gradient_of(p) for p in active])
        self._begin(active, values, ("first", "second", "sum"))
        first, second = self.part(active, "first"), self.part(active, "second")
        torch._foreach_lerp_(first, torch._foreach_mul(gradients, d), 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, gradients, gradients, d * d * (1 - beta2))
        sums = self.part(active, "sum")
        torch._foreach_mul_(sums, beta3)
        weight = d / d0 * (d if group["safeguard_warmup"] else rate)
        torch._foreach_add_(sums, gradients, alpha=weight)
        moved = torch._foreach_sub(self.part(active, "start"), values)
        gain, size = _totals(torch._foreach_mul(moved, gradients), torch._foreach_norm(sums, 1))
        if size == 0:  # no gradient yet
            return self.keep_numbers(active, [d, most, numerator, done])
        numerator = beta3 * numerator + d / d0 * rate * gain
        estimate = group["d_coef"] * numerator / size
        if d == d0:
            d = max(d, estimate)
        most = max(most, estimate)
        d = min(most, d * group["growth_rate"])
        scales = torch._foreach_sqrt(second)
        torch._foreach_add_(scales, d * group["eps"])
        torch._foreach_mul_(values, 1 - rate * group["weight_decay"])
        torch._foreach_addcdiv_(values, first, scales, -rate)
        torch._foreach_copy_(active, values)
        return self.keep_numbers(active, [d, most, numerator, done + 1])

    def _adamw_step(self, group: dict[str, Any], active: list[Tensor]) -> None:
        """A step of a group that keeps its rate."""
        [done] = self.numbers_of(group, [0.0])
        values, gradients = in_float32(active), in_float32([gradient_of(p) for p in active])
        self._begin(active, values, ("first", "second"))
        beta1, beta2 = group["betas"]
        adamw(
            values,
            gradients,
            self.part(active, "first"),
            self.part(active, "second"),
            [],
            [torch.tensor(done) for _ in active],
            foreach=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        torch._foreach_copy_(active, values)
        self.keep_numbers(active, [done + 1])

    def _begin(self, active: list[Tensor], values: list[Tensor], zeros: tuple[str, ...]) -> None:
        """Add the state of parameters that have none."""
        for parameter, value in zip(active, values, strict=True):
            if parameter not in self.state:
                self.state[parameter] = {key: torch.zeros_like(value) for key in zeros}
                if "sum" in zeros:
                    self.state[parameter]["start"] = value.clone()

    def distances(self) -> list[float]:
        """The estimate d of each group; 1 of those that keep their rate."""
        return [
            self.numbers_of(group, [group["d0"]])[0] if group["rate_free"] else 1.0
            for group in self.param_groups
        ]


def _totals(products: Sequence[Tensor], norms: Sequence[Tensor]) -> tuple[float, float]:
    """The sums of all entries of tensors, and of numbers, fetched from the device at once."""
    gain = torch.stack([each.sum() for each in products]).sum()
    gain, size = torch.stack([gain, torch.stack(list(norms)).sum()]).tolist()
    return gain, size


PRODIGY = OptimizerSpec(Prodigy, lr=1.0, moves_pairs=False, rate_free=True)
