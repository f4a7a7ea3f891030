"""What the trainer needs to know of an optimizer."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer

from rite_diffusion.errors import OptimizerError


@dataclass(frozen=True)
class OptimizerSpec:
    """A way to build an optimizer and the learning rate that suits it.

    `make` takes torch parameter groups, whose `params` are (name, parameter) tuples, and options;
    each group has its `lr` and may have `weight_decay`.
    """

    make: Callable[..., Optimizer]
    lr: float

    def options(self) -> dict[str, Any]:
        """Options with their defaults, beside the rate and the weight decay that groups carry."""
        parameters = list(inspect.signature(self.make).parameters.values())[1:]
        return {p.name: p.default for p in parameters if p.name not in ("lr", "weight_decay")}

    def build(self, groups: list[dict], **options: Any) -> Optimizer:
        """The optimizer; raises OptimizerError for an option it does not have."""
        known = self.options()
        unknown = [name for name in options if name not in known]
        if unknown:
            raise OptimizerError(
                f"no option '{unknown[0]}': this optimizer has {', '.join(known) or 'none'}"
            )
        return self.make(groups, **options)
