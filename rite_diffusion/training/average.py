"""An exponential moving average of the trained weights, as the adapter that is saved and shown."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """Averages of named parameters; with decay 0 it is the parameters themselves."""

    def __init__(self, named: list[tuple[str, nn.Parameter]], decay: float):
        self.decay = decay
        self.parameters: list[Tensor] = [parameter for _, parameter in named] if decay else []
        self.names = [name for name, _ in named] if decay else []
        self.values = [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move on after a step counted from 0; the decay grows over the first steps."""
        decay = min(self.decay, (1 + step) / (10 + step))
        if self.values:
            torch._foreach_lerp_(self.values, self.parameters, 1 - decay)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """The averages in the parameters' place while the block runs."""
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
        """The averages by name."""
        return dict(zip(self.names, self.values, strict=True))

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Restore what `state` gave; averages that it lacks start from the weights."""
        for name, parameter, value in zip(self.names, self.parameters, self.values, strict=True):
            value.copy_(state.get(name, parameter.detach()))
