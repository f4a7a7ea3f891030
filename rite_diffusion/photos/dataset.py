"""Photos as latents in memory, and which of them each training step uses."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rite_diffusion.photos.images import fit, mask_tensor, to_tensor
from rite_diffusion.types import Backbone, Photo


@dataclass(frozen=True)
class LatentSet:
    """An epoch's samples: rows of the photos' latents, which are kept once.

    With `flip`, each photo's mirror image follows it.
    """

    latents: Tensor  # (N, C, h, w) fp32
    masks: Tensor | None  # (N, 1, h, w) in [0, 1]; None where no photo has one
    samples: list[int]  # row of each sample; repeated photos come several times
    captions: list[str]  # of the samples
    names: list[str]  # of the samples' files


@torch.no_grad()
def encode_photos(
    backbone: Backbone, photos: Sequence[Photo], resolution: int, flip: bool
) -> LatentSet:
    """Latents of the photos' square centres at `resolution` pixels, encoded once."""
    latents, masks, samples, captions, names = [], [], [], [], []
    masked = any(photo.mask is not None for photo in photos)
    for photo in photos:
        pixels = to_tensor(fit(photo.image, resolution, resolution))
        views = [pixels, pixels.flip(-1)] if flip else [pixels]
        rows = list(range(len(latents), len(latents) + len(views)))
        latents += backbone.encode_images(torch.stack(views)).float()
        if masked:
            mask = photo.mask or Image.new("L", photo.image.size, 255)
            whole = mask_tensor(mask, resolution, latents[-1].shape[1:])
            masks += [whole, whole.flip(-1)] if flip else [whole]
        samples += rows * photo.repeats
        captions += [photo.caption] * len(rows) * photo.repeats
        names += [photo.path.name] * len(rows) * photo.repeats
    stacked = torch.stack(masks) if masked else None
    return LatentSet(torch.stack(latents), stacked, samples, captions, names)


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
