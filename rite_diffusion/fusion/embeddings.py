"""Embeddings of several adapters' triggers, put together."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rite_diffusion.errors import FusionError


def merge_tokens(each: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Token name -> embedding of all adapters; FusionError where two embed one name differently.

    A weight scales an adapter's updates, never its tokens: a trigger means what it was trained to.
    """
    merged: dict[str, Tensor] = {}
    for tokens in each:
        for name, embedding in tokens.items():
            if name in merged and not torch.equal(merged[name], embedding):
                raise FusionError(
                    f"two adapters have different embeddings of '{name}': train one of them "
                    "with another trigger."
                )
            merged[name] = embedding
    return dict(sorted(merged.items()))
