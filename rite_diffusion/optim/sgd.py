"""Stochastic gradient descent with momentum, torch's own in its fused form."""

import torch

from rite_diffusion.optim.spec import OptimizerSpec


def build(groups: list[dict]) -> torch.optim.Optimizer:
    """SGD with momentum 0.9 over parameter groups."""
    return torch.optim.SGD(groups, momentum=0.9, fused=True)


SGD = OptimizerSpec(build, lr=1.0)
