"""DoRA layers as plain updates of the base's weights, which can be added and fused.

A DoRA replaces a weight W by m (W + D) / |W + D| (Liu et al. 2024, Eq. 5). Since it scales the rows
of W, the difference has full rank, whatever the rank of D: a fusion of DoRAs is a large file unless
`rank` limits it.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from rite_diffusion.adapters import Adapter
from rite_diffusion.adapters.delta import adapted_weight
from rite_diffusion.fusion.layer import Factors, as_pair
from rite_diffusion.types import LoraPair


def has_dora(adapter: Adapter) -> bool:
    """Whether any layer of the adapter is a DoRA."""
    return any(pair.magnitude is not None for pair in adapter.pairs)


def as_plain(adapter: Adapter, weights: Mapping[str, Tensor]) -> Adapter:
    """The adapter with DoRA layers as plain updates; `weights` are the base's by module name."""
    pairs = [
        pair if pair.magnitude is None else plain_pair(pair, weights[pair.name])
        for pair in adapter.pairs
    ]
    return replace(adapter, pairs=pairs)


def plain_pair(pair: LoraPair, weight: Tensor) -> LoraPair:
    """The pair of scale 1 and full rank with the update of a DoRA on a base's weight."""
    exact = weight.detach().cpu().double()
    update = (adapted_weight(_in_double(pair), exact) - exact).flatten(1)  # (out, inputs)
    out, inputs = update.shape
    identity = torch.eye(min(out, inputs), dtype=update.dtype)
    factors = Factors(identity, update) if out <= inputs else Factors(update, identity)
    return as_pair(pair.name, factors, pair.down.shape[1:])


def _in_double(pair: LoraPair) -> LoraPair:
    down, up = pair.down.double(), pair.up.double()
    magnitude = pair.magnitude.double() if pair.magnitude is not None else None
    return replace(pair, down=down, up=up, magnitude=magnitude)
