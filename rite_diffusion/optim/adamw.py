"""AdamW (Loshchilov & Hutter 2019), torch's own in its fused form."""

import torch

from rite_diffusion.optim.spec import OptimizerSpec


def build(groups: list[dict]) -> torch.optim.Optimizer:
    """AdamW over parameter groups."""
    return torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8, fused=True)


ADAMW = OptimizerSpec(build, lr=2e-3)
