"""An exponential moving average (EMA) of the trained weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """Moving averages of named parameters; with decay 0 there are none, and swaps do nothing."""

    def __init__(self, named: list[tuple[str, nn.Parameter]], decay: float):
        self.decay = decay
        self.parameters: list[Tensor] = [parameter for _, parameter in named] if decay else []
        self.names = [name for name, _ in named] if decay else []
        self.values = [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update the averages after a step, counted from 0; the decay rises in the first steps."""
        decay = min(self.decay, (1 + step) / (10 + step))
        if self.values:
            torch._foreach_lerp_(self.values, self.parameters, 1 - decay)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Exchange parameters and averages until the block ends."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for parameter, value in zip(self.parameters, self.values, strict=True):
            kept = parameter.detach().clone()
            parameter.copy_(value)
            value.copy_(kept)

    def state(self) -> dict[str, Tensor]:
        """Parameter name -> average."""
        return dict(zip(self.names, self.values, strict=True))

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Restore a `state`; averages that it lacks are set to the weights."""
        for name, parameter, value in zip(self.names, self.parameters, self.values, strict=True):
            value.copy_(state.get(name, parameter.detach()))
