"""AdamW (Loshchilov & Hutter 2019): PyTorch's, fused."""

import torch

from rite_diffusion.optim.spec import OptimizerSpec


def adamw(
    groups: list[dict], betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
) -> torch.optim.AdamW:
    """PyTorch's fused AdamW for parameter groups."""
    return torch.optim.AdamW(groups, betas=betas, eps=eps, fused=True)


ADAMW = OptimizerSpec(adamw, lr=1e-3, moves_pairs=False)
