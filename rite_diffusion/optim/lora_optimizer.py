"""Base class of the LoRA-aware optimizers: stacks, saving of state, AdamW for other parameters."""

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from rite_diffusion.errors import OptimizerError
from rite_diffusion.optim.factors import Stack, factor_of, gradient_of, module_of, stacks_of
from rite_diffusion.optim.state import restore_uncast

FUSED = ("cpu", "cuda", "xpu", "mps")  # devices with torch's fused AdamW


class LoraOptimizer(Optimizer):
    """An optimizer with its own rule for LoRA pairs, and AdamW for every other parameter.

    Pairs of equal shape are one stacked tensor, so the number of operations does not grow with the
    number of pairs. Arithmetic and state are float32 (float64 for float64 parameters) whatever the
    parameters' dtype. Parameters without a gradient, and their state, do not change.

    A group of both is divided into two groups, of pairs and of other parameters. The latter's `lr`
    is `lr_other`, where that is set and their own group states none.

    `params` are named parameters or groups of them, such as `lora_param_groups(model)`. `step`
    raises OptimizerError, before anything has changed, naming the module of a gradient that is
    sparse or not finite. Closures work as in PyTorch's optimizers.
    """

    def __init__(self, params: Any, defaults: dict[str, Any]):
        check_settings(defaults)
        self._stacks: list[Stack] = []
        super().__init__(params, defaults)

    @abstractmethod
    def update_pairs(
        self, stacks: list[Stack], values: list[list[Tensor]], gradients: list[list[Tensor]]
    ) -> list[list[Tensor]]:
        """New values of all pairs.

        Per stack, values and gradients are [down (n, rank, in), up (n, out, rank)]. `stack.step`
        is 1 at the first step; `stack.state` is empty then.
        """

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add named parameters; raises OptimizerError for factors that do not form pairs."""
        for part in divided(param_group, self.defaults["lr_other"]):
            super().add_param_group(part)
            group = self.param_groups[-1]
            check_settings(group)
            self._stacks += stacks_of(group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every parameter that has a gradient; returns the closure's value."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        stacks = self._active_stacks()
        gradients = [gather(stack, gradients=True) for stack in stacks]
        check_finite(stacks, gradients)
        values = [gather(stack, gradients=False) for stack in stacks]
        for stack in stacks:
            stack.step += 1
        pairs = [index for index, stack in enumerate(stacks) if stack.is_pair]
        updated = self.update_pairs(
            [stacks[i] for i in pairs], [values[i] for i in pairs], [gradients[i] for i in pairs]
        )
        for index, new in zip(pairs, updated, strict=True):
            values[index] = new
        for index, stack in enumerate(stacks):
            if not stack.is_pair:
                adamw_step(stack, values[index], gradients[index])
        for stack, new in zip(stacks, values, strict=True):
            for part, value in enumerate(new):
                stack.scatter(part, value)
        return loss

    def _active_stacks(self) -> list[Stack]:
        """The stacks of members with gradients; stacks are divided where only some have one."""
        active, every = [], []
        for stack in self._stacks:
            has = [all(p.grad is not None for p in member) for member in zip(*stack.parts)]  # noqa: B905
            for wanted in (True, False):
                chosen = [index for index, value in enumerate(has) if value is wanted]
                if chosen:
                    part = stack if len(chosen) == len(has) else stack.select(chosen)
                    every.append(part)
                    active += [part] if wanted else []
        self._stacks = every
        for stack in active:
            check_dense(stack)
        return active

    def _publish(self) -> None:
        """Copy the stacks' state into PyTorch's state per parameter."""
        for stack in [stack for stack in self._stacks if stack.step]:
            states = stack.state or [{} for _ in stack.parts]
            for parameters, state in zip(stack.parts, states, strict=True):
                for index, parameter in enumerate(parameters):
                    own = {key: value[index] for key, value in state.items()}
                    self.state[parameter] = own | {"step": torch.tensor(float(stack.step))}

    def state_dict(self) -> dict[str, Any]:
        """The state for an exact continuation, per parameter, in PyTorch's form."""
        self._publish()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a `state_dict` bit for bit.

        Raises OptimizerError where the names of its parameters differ from the optimizer's.
        """
        saved = [n for group in state_dict["param_groups"] for n in group.get("param_names", [])]
        own = [name for group in self.param_groups for name in group["param_names"]]
        if saved != own:
            odd = next((n for n in [*saved, *own] if (n in saved) != (n in own)), "their order")
            raise OptimizerError(
                f"the saved optimizer state is for {len(saved)} parameters, this optimizer has "
                f"{len(own)}; first difference: {odd}"
            )
        super().load_state_dict(state_dict)
        restore_uncast(self, state_dict)
        self._restack()

    def _restack(self) -> None:
        """Build the stacks from PyTorch's state per parameter."""
        self._stacks = []
        for group in self.param_groups:
            for whole in stacks_of(group):
                steps = defaultdict(list)
                for index, parameter in enumerate(whole.parts[0]):
                    steps[int(self.state.get(parameter, {}).get("step", 0))].append(index)
                for step, members in steps.items():
                    stack = whole.select(members)
                    stack.step = step
                    if step and any(key != "step" for key in self.state[stack.parts[0][0]]):
                        stack.state = [
                            stack_state([self.state[p] for p in part]) for part in stack.parts
                        ]
                    self._stacks.append(stack)
        self.state.clear()

    def __getstate__(self) -> dict[str, Any]:
        self._publish()
        return super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._restack()


def divided(group: dict[str, Any], lr_other: float | None) -> list[dict[str, Any]]:
    """The group as one of LoRA factors and one of other parameters, where it has both.

    `lr_other`, if not None, is the rate of the others, unless the group has only others and a rate.
    """
    params = group["params"]
    named: list[Any] = [params] if isinstance(params, Tensor) else list(params)
    if not all(isinstance(each, tuple) for each in named):
        return [group | {"params": named}]  # to be refused for their missing names
    others = [each for each in named if factor_of(*each) is None]
    factors = [each for each in named if factor_of(*each) is not None]
    own = {} if lr_other is None or (not factors and "lr" in group) else {"lr": lr_other}
    parts = [group | {"params": factors}] if factors or not others else []
    return parts + ([group | {"params": others} | own] if others else [])


def stack_state(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The states of n parameters, stacked to (n, …); step counts are left out."""
    return {key: torch.stack([s[key] for s in states]) for key in states[0] if key != "step"}


def gather(stack: Stack, gradients: bool) -> list[Tensor]:
    """Values or gradients of each part of a stack."""
    return [stack.gather(part, gradients) for part in range(len(stack.parts))]


def check_settings(settings: dict[str, Any]) -> None:
    """Raise OptimizerError naming a setting that is out of range."""
    for name in (
        "lr",
        "eps",
        "weight_decay",
        "damping",
        "clip_unmagnified",
        "skip_rms",
        "lr_other",
        "core_damping",
        "sign_eps",
    ):
        value = settings.get(name) or 0.0
        if not value >= 0 or value == float("inf"):
            raise OptimizerError(f"{name} = {value}: must be zero or positive, and finite")
    if not 0 <= settings.get("momentum", 0.0) < 1:
        raise OptimizerError(f"momentum = {settings['momentum']}: must be in [0, 1)")
    for beta in settings.get("betas", ()):
        if not 0 <= beta < 1:
            raise OptimizerError(f"betas = {settings['betas']}: each must be in [0, 1)")


def check_dense(stack: Stack) -> None:
    """Raise OptimizerError for sparse gradients."""
    for part in stack.parts:
        for name, parameter in zip(stack.names, part, strict=True):
            if gradient_of(parameter).is_sparse:
                raise OptimizerError(
                    f"{module_of(name)}: its gradient is sparse; make the layer with sparse=False"
                )


def check_finite(stacks: list[Stack], gradients: list[list[Tensor]]) -> None:
    """Raise OptimizerError naming the first module whose gradient has NaN or infinity."""
    sums = [gradient.sum() for parts in gradients for gradient in parts]
    if not sums or torch.stack([s.to(sums[0].device) for s in sums]).sum().isfinite():
        return
    for stack, parts in zip(stacks, gradients, strict=True):
        for gradient in parts:
            finite = gradient.isfinite().flatten(1).all(1).tolist()
            if not all(finite):
                raise OptimizerError(
                    f"{module_of(stack.names[finite.index(False)])}: its gradient has NaN or "
                    "infinite values; nothing was updated. Lower the rate or the loss scale"
                )


def adamw_step(stack: Stack, values: list[Tensor], gradients: list[Tensor]) -> None:
    """AdamW (Loshchilov & Hutter 2019, Alg. 2) on stacked values, in place."""
    if not stack.state:
        stack.state = [
            {"first": torch.zeros_like(v), "second": torch.zeros_like(v)} for v in values
        ]
    group = stack.group
    beta1, beta2 = group["betas"]
    device = values[0].device
    count = torch.tensor(float(stack.step - 1), device=device)
    adamw(
        values,
        gradients,
        [state["first"] for state in stack.state],
        [state["second"] for state in stack.state],
        [],
        [count.clone() for _ in values],
        fused=device.type in FUSED,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )
