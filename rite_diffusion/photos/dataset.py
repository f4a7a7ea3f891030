"""Photos as latents in memory, and which of them each training step uses."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rite_diffusion.photos.images import fit, to_tensor
from rite_diffusion.types import Backbone, Photo


@dataclass(frozen=True)
class LatentSet:
    """Every photo's latents and caption; with `flip`, each photo's mirror image follows it."""

    latents: Tensor  # (N, C, h, w) fp32
    captions: list[str]
    names: list[str]  # of the photos' files


@torch.no_grad()
def encode_photos(
    backbone: Backbone, photos: Sequence[Photo], resolution: int, flip: bool
) -> LatentSet:
    """Latents of the photos' square centres at `resolution` pixels, encoded once."""
    latents, captions, names = [], [], []
    for photo in photos:
        pixels = to_tensor(fit(photo.image, resolution, resolution))
        views = [pixels, pixels.flip(-1)] if flip else [pixels]
        latents.append(backbone.encode_images(torch.stack(views)).float())
        captions += [photo.caption] * len(views)
        names += [photo.path.name] * len(views)
    return LatentSet(torch.cat(latents), captions, names)


def generator(*keys: int) -> torch.Generator:
    """A CPU generator that is a function of its keys, such as (seed, step, stream)."""
    state = np.random.SeedSequence(keys).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(state[0]) << 32 | int(state[1]))


def batch_indices(count: int, batch: int, seed: int, step: int) -> list[int]:
    """Indices of one step's samples: epoch by epoch, each in its own random order.

    A function of (seed, step) alone, so that a resumed run sees what an unbroken one would.
    """
    places = range(step * batch, (step + 1) * batch)
    orders = {
        epoch: torch.randperm(count, generator=generator(seed, epoch, 0)).tolist()
        for epoch in {place // count for place in places}
    }
    return [orders[place // count][place % count] for place in places]
