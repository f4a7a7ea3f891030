"""Optimizer state that keeps its dtype."""

from typing import Any

import torch
from torch.optim import Optimizer


def restore_uncast(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """Set an optimizer's state to a `state_dict`'s, which PyTorch casts to the parameters' dtype.

    Numbers stay in main memory.
    """
    indices = [index for group in state_dict["param_groups"] for index in group["params"]]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, parameter in zip(indices, parameters, strict=True):
        if index in state_dict["state"]:
            optimizer.state[parameter] = {
                key: value.to(parameter.device) if value.dim() else value.clone()
                for key, value in state_dict["state"][index].items()
            }


class UncastOptimizer(Optimizer):
    """An optimizer for any parameters, with arithmetic and state in float32 at least.

    What a group keeps beside its settings is `numbers`, a tensor in the state of each of its
    parameters, so that `state_dict` has it.
    """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a `state_dict` bit for bit."""
        super().load_state_dict(state_dict)
        restore_uncast(self, state_dict)

    def numbers_of(self, group: dict[str, Any], start: list[float]) -> list[float]:
        """The group's numbers, `start` before its first step."""
        kept = (self.state[p]["numbers"] for p in group["params"] if p in self.state)
        found = next(kept, None)
        return start if found is None else found.tolist()

    def keep_numbers(self, parameters: list[torch.Tensor], numbers: list[float]) -> None:
        """Keep a group's numbers in the state of its parameters."""
        kept = torch.tensor(numbers, dtype=torch.float64)
        for parameter in parameters:
            self.state[parameter]["numbers"] = kept

    def part(self, parameters: list[torch.Tensor], key: str) -> list[torch.Tensor]:
        """The state's tensors of that key."""
        return [self.state[parameter][key] for parameter in parameters]


def in_float32(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors in float32, or float64 where they are; the same tensors where nothing changes."""
    return [t.detach().to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]
