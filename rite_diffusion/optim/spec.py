"""What the trainer needs to know of an optimizer."""

from collections.abc import Callable
from dataclasses import dataclass

from torch.optim import Optimizer


@dataclass(frozen=True)
class OptimizerSpec:
    """A way to build an optimizer and the learning rate that suits it.

    `build` takes torch parameter groups; each group has its `params` and `lr`, and may have
    `weight_decay`.
    """

    build: Callable[[list[dict]], Optimizer]
    lr: float
