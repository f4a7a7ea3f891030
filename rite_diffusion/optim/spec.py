"""The specification of an optimizer for the trainer."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer

from rite_diffusion.errors import OptimizerError


@dataclass(frozen=True)
class OptimizerSpec:
    """A function that builds an optimizer, and its default learning rate.

    `make` takes PyTorch parameter groups, whose `params` are (name, parameter) tuples, and options;
    each group has `lr` and may have `weight_decay`.
    """

    make: Callable[..., Optimizer]
    lr: float
    moves_pairs: bool = True  # whether it treats LoRA factors unlike other parameters
    rate_free: bool = False  # whether it finds its rate; groups may opt out by `rate_free` = False
    schedule_free: bool = False  # whether its average replaces a decay of the rate

    def options(self) -> dict[str, Any]:
        """The options and their defaults, without `lr` and `weight_decay`, which groups have."""
        parameters = list(inspect.signature(self.make).parameters.values())[1:]
        return {p.name: p.default for p in parameters if p.name not in ("lr", "weight_decay")}

    def build(self, groups: list[dict], **options: Any) -> Optimizer:
        """The optimizer for the groups; raises OptimizerError for an unknown option."""
        known = self.options()
        unknown = [name for name in options if name not in known]
        if unknown:
            raise OptimizerError(
                f"no option '{unknown[0]}': this optimizer has {', '.join(known) or 'none'}"
            )
        return self.make(groups, **options)
