"""LoRA+: AdamW with a higher learning rate for `up` (Hayou et al. 2024, arXiv 2402.12354)."""

import torch

from rite_diffusion.optim.factors import factor_of
from rite_diffusion.optim.spec import OptimizerSpec

LR = 5e-4


def adamw_plus(
    groups: list[dict],
    lr: float = LR,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    ratio: float = 16.0,
) -> torch.optim.AdamW:
    """AdamW for named parameter groups, in which `up` factors have `ratio` times the group's rate.

    `lr` is the rate of groups that state none.

    By the paper's Sec. 4 the ratio of the rates should grow with the width; its practical advice is
    2^4.
    """
    divided = []
    for group in groups:
        ups = [
            (n, p) for n, p in group["params"] if (factor := factor_of(n, p)) and factor[0] == "up"
        ]
        rest = [(n, p) for n, p in group["params"] if n not in dict(ups)]
        divided += [group | {"params": rest}] if rest else []
        divided += [group | {"params": ups, "lr": group.get("lr", lr) * ratio}] if ups else []
    return torch.optim.AdamW(divided, lr=lr, betas=betas, eps=eps, fused=True)


ADAMW_PLUS = OptimizerSpec(adamw_plus, lr=LR)
