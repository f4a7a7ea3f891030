"""Optimizers by name: `OPTIMIZERS[name].build(groups)` makes one of parameter groups."""

from rite_diffusion.optim.adamw import ADAMW
from rite_diffusion.optim.sgd import SGD
from rite_diffusion.optim.spec import OptimizerSpec

OPTIMIZERS: dict[str, OptimizerSpec] = {"adamw": ADAMW, "sgd": SGD}

__all__ = ["OPTIMIZERS", "OptimizerSpec"]
