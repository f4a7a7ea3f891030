"""AdamW (Loshchilov & Hutter 2019), torch's own in its fused form."""

import torch

from rite_diffusion.optim.spec import OptimizerSpec


def adamw(
    groups: list[dict], betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
) -> torch.optim.AdamW:
    """AdamW over parameter groups."""
    return torch.optim.AdamW(groups, betas=betas, eps=eps, fused=True)


ADAMW = OptimizerSpec(adamw, lr=1e-3)
