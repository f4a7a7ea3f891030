"""Stochastic gradient descent with momentum: PyTorch's, fused."""

import torch

from rite_diffusion.optim.spec import OptimizerSpec


def sgd(groups: list[dict], momentum: float = 0.9) -> torch.optim.SGD:
    """PyTorch's fused SGD with momentum for parameter groups."""
    return torch.optim.SGD(groups, momentum=momentum, fused=True)


SGD = OptimizerSpec(sgd, lr=0.03, moves_pairs=False)
