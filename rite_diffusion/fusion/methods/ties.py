"""TIES: trim, elect signs, merge entries of that sign (Yadav et al. 2023, arXiv 2306.01708)."""

import torch
from torch import Tensor

from rite_diffusion.fusion.layer import Factors, Layer
from rite_diffusion.fusion.low_rank import as_factors
from rite_diffusion.fusion.settings import FusionSettings


def ties(layer: Layer, settings: FusionSettings) -> Factors:
    """The TIES merge of the dense updates; `cut_dense` limits its rank.

    The paper trims over the whole model; here each layer is trimmed on its own, so that only one
    layer is dense at a time.
    """
    updates = torch.stack([part.factors.dense() for part in layer.parts])
    return as_factors(ties_merge(updates, settings.trim))


def ties_merge(updates: Tensor, density: float) -> Tensor:
    """The merge (…) of updates (n, …): the mean of the entries that have the elected sign."""
    trimmed = torch.stack([trim(update, density) for update in updates])
    sign = trimmed.sum(0).sign()
    agrees = (trimmed.sign() == sign) & (trimmed != 0)
    return (trimmed * agrees).sum(0) / agrees.sum(0).clamp(min=1)


def trim(update: Tensor, density: float) -> Tensor:
    """The update with its largest entries, a share `density` of all; the others are 0."""
    count = max(1, round(density * update.numel()))
    least = update.abs().flatten().kthvalue(update.numel() - count + 1).values
    return update * (update.abs() >= least)
