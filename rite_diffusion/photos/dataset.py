"""Photos as latents in memory."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from PIL import Image
from torch import Tensor

from rite_diffusion.photos.buckets import bucket_of, bucket_sizes
from rite_diffusion.photos.images import fit, mask_tensor, to_tensor
from rite_diffusion.types import Backbone, Photo


@dataclass(frozen=True)
class LatentSet:
    """An epoch's samples: rows of the photos' latents, which are kept once.

    With `flip`, each photo's mirror image follows it.
    """

    latents: list[Tensor]  # (C, h, w) fp32 each
    masks: list[Tensor] | None  # (1, h, w) in [0, 1] each; None where no photo has one
    samples: list[int]  # row of each sample; repeated photos come several times
    captions: list[str]  # of the samples
    names: list[str]  # of the samples' files

    @cached_property
    def buckets(self) -> list[list[int]]:
        """The samples of each shape."""
        shapes: dict[torch.Size, list[int]] = {}
        for sample, row in enumerate(self.samples):
            shapes.setdefault(self.latents[row].shape, []).append(sample)
        return list(shapes.values())


def target_sizes(
    photos: Sequence[Photo], resolution: int, multiple: int, bucketed: bool
) -> list[tuple[int, int]]:
    """The size (width, height) to which each photo is scaled and cut."""
    sizes = bucket_sizes(resolution, multiple) if bucketed else [(resolution, resolution)]
    return [bucket_of(photo.image.size, sizes) for photo in photos]


@torch.no_grad()
def encode_photos(
    backbone: Backbone, photos: Sequence[Photo], resolution: int, flip: bool, bucketed: bool = False
) -> LatentSet:
    """Latents of the photos, scaled to cover their size and cut about the centre, encoded once."""
    latents, masks, samples, captions, names = [], [], [], [], []
    masked = any(photo.mask is not None for photo in photos)
    targets = target_sizes(photos, resolution, backbone.multiple, bucketed)
    for photo, size in zip(photos, targets, strict=True):
        pixels = to_tensor(fit(photo.image, *size))
        views = [pixels, pixels.flip(-1)] if flip else [pixels]
        rows = list(range(len(latents), len(latents) + len(views)))
        latents += backbone.encode_images(torch.stack(views)).float()
        if masked:
            mask = photo.mask or Image.new("L", photo.image.size, 255)
            whole = mask_tensor(mask, size, latents[-1].shape[1:])
            masks += [whole, whole.flip(-1)] if flip else [whole]
        samples += rows * photo.repeats
        captions += [photo.caption] * len(rows) * photo.repeats
        names += [photo.path.name] * len(rows) * photo.repeats
    return LatentSet(latents, masks if masked else None, samples, captions, names)
