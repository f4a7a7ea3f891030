"""Stochastic gradient descent with momentum, torch's own in its fused form."""

import torch

from rite_diffusion.optim.spec import OptimizerSpec


def sgd(groups: list[dict], momentum: float = 0.9) -> torch.optim.SGD:
    """SGD with momentum over parameter groups."""
    return torch.optim.SGD(groups, momentum=momentum, fused=True)


SGD = OptimizerSpec(sgd, lr=0.03)
