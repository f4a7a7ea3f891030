"""DARE: drop entries at random and rescale the rest (Yu et al. 2024, arXiv 2311.03099)."""

import hashlib

import torch
from torch import Tensor

from rite_diffusion.fusion.layer import Factors, Layer
from rite_diffusion.fusion.low_rank import as_factors
from rite_diffusion.fusion.settings import FusionSettings


def dare(layer: Layer, settings: FusionSettings) -> Factors:
    """Sum_i w_i mask_i D_i / keep; `cut_dense` limits its rank.

    A mask is a function of the adapter's content and the layer's name, so it depends neither on the
    order of the adapters nor on the other adapters.
    """
    total = torch.zeros_like(layer.parts[0].factors.dense())
    for part in layer.parts:
        update = part.factors.dense()
        mask = bernoulli(update.shape, settings.keep, f"{part.concept} {layer.name}")
        total += update * mask / settings.keep
    return as_factors(total)


def bernoulli(shape: torch.Size, share: float, key: str) -> Tensor:
    """A boolean mask, true with probability `share`; a function of the key."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8])
    draws = torch.rand(shape, generator=torch.Generator().manual_seed(seed % 2**63))
    return draws < share
