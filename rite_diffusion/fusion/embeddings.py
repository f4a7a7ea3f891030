"""Learned embeddings of several adapters, merged."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rite_diffusion.errors import FusionError


def merge_tokens(each: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """All adapters' learned embeddings by word; FusionError where two differ for one word.

    An adapter's weight does not scale its embeddings.
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
