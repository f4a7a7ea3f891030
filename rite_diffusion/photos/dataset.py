"""Photos encoded to latents in memory."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count as count_up
from pathlib import Path

import torch
from torch import Tensor

from rite_diffusion.backbones.protocols import Backbone
from rite_diffusion.config import AugmentSection
from rite_diffusion.errors import ConfigError
from rite_diffusion.photos.augment import View, views_of
from rite_diffusion.photos.buckets import bucket_of, bucket_sizes
from rite_diffusion.photos.folder import PhotoFolder
from rite_diffusion.photos.images import mask_tensor, to_tensor
from rite_diffusion.photos.latent_cache import cached_latents
from rite_diffusion.seeding import Stream, generator
from rite_diffusion.types import Concept, Photo

LONGEST_SIDE = 4096  # pixels
TOLERANCE = 0.1  # largest relative difference of how often balanced groups are shown


@dataclass(frozen=True)
class LatentSet:
    """The samples of an epoch, as indices of latents, each of which is stored once."""

    latents: list[Tensor]  # (C, h, w) fp32 each
    masks: list[Tensor] | None  # (1, h, w) in [0, 1] each; None if no view has one
    samples: list[int]  # index into `latents` of each sample; repeated photos occur several times
    captions: list[str]  # of the samples
    weights: list[float]  # of the samples' losses
    names: list[str]  # of the samples' files

    @cached_property
    def buckets(self) -> list[list[int]]:
        """Indices of the samples, grouped by the shape of their latents."""
        shapes: dict[torch.Size, list[int]] = {}
        for sample, row in enumerate(self.samples):
            shapes.setdefault(self.latents[row].shape, []).append(sample)
        return list(shapes.values())


@dataclass(frozen=True)
class Encoding:
    """The settings that decide the latents of photos."""

    resolution: int  # pixels: pictures have the area of a square of this side
    bucketed: bool = False  # otherwise all are cropped to squares
    augment: AugmentSection = AugmentSection()
    mask_floor: float = 0.0  # weight of cells outside the mask
    seed: int = 0  # of the random views
    cache: Path | None = None  # folder of cached latents


def target_sizes(
    photos: Sequence[Photo], resolution: int, multiple: int, bucketed: bool
) -> list[tuple[int, int]]:
    """The size (width, height) to which each photo is scaled and cropped."""
    sizes = bucket_sizes(resolution, multiple) if bucketed else [(resolution, resolution)]
    return [bucket_of(photo.size, sizes) for photo in photos]


def balanced(groups: Sequence[Sequence[Photo]]) -> list[Photo]:
    """All photos, repeated so that an epoch shows each group equally often, to within a tenth.

    Repeats are the smallest integers that do so.
    """
    counts = [sum(photo.repeats for photo in group) for group in groups]
    goals = count_up(max(counts), max(counts))
    goal = next(goal for goal in goals if all(_divides(count, goal) for count in counts))
    return [
        replace(photo, repeats=photo.repeats * round(goal / count))
        for group, count in zip(groups, counts, strict=True)
        for photo in group
    ]


def _divides(count: int, goal: int) -> bool:
    """Whether a multiple of a count is within TOLERANCE of a goal."""
    return abs(round(goal / count) * count - goal) <= TOLERANCE * goal


def hold_out(
    folders: Sequence[PhotoFolder], concepts: Sequence[Concept], count: int, seed: int
) -> tuple[list[list[Photo]], list[Photo]]:
    """Each concept's photos to train on, and `count` random photos for validation.

    `concepts` has the concept of each folder. Raises ConfigError where a concept has no photo left.
    """
    photos = [photo for folder in folders for photo in folder.photos]
    order = torch.randperm(len(photos), generator=generator(seed, 0, Stream.HELD_OUT)).tolist()
    held_out = [photos[place] for place in sorted(order[:count])]
    paths = {photo.path for photo in held_out}
    groups: dict[Concept, list[Photo]] = {concept: [] for concept in concepts}
    for concept, folder in zip(concepts, folders, strict=True):
        groups[concept] += [photo for photo in folder.photos if photo.path not in paths]
    for concept, kept in groups.items():
        if not kept:
            raise ConfigError(
                f"validation.photos = {count} leaves no photo of {concept.trigger} to train on: "
                "hold out fewer."
            )
    return list(groups.values()), held_out


def training_side(backbone: Backbone, resolution: int | None) -> int:
    """The side of training pictures in pixels; ConfigError where it does not fit the backbone."""
    side = backbone.resolution if resolution is None else resolution
    if side % backbone.multiple or not 0 < side <= LONGEST_SIDE:
        raise ConfigError(
            f"resolution {side} is not a multiple of {backbone.multiple} pixels "
            f"up to {LONGEST_SIDE}"
        )
    return side


@torch.no_grad()
def encode_photos(backbone: Backbone, photos: Sequence[Photo], how: Encoding) -> LatentSet:
    """Latents of all views of the photos, each encoded once."""
    latents, masks = list[Tensor](), list[Tensor]()
    samples, captions, weights, names = list[int](), list[str](), list[float](), list[str]()
    cache = how.cache and how.cache / backbone.encoder_fingerprint()
    targets = target_sizes(photos, how.resolution, backbone.multiple, how.bucketed)
    for index, (photo, size) in enumerate(zip(photos, targets, strict=True)):
        views = views_of(photo, size, how.augment, how.seed, index)
        pixels = torch.stack([to_tensor(view.image) for view in views])
        rows = list(range(len(latents), len(latents) + len(views)))
        latents += cached_latents(backbone, pixels, cache)
        masks += [_mask(view, latents[-1].shape[1:], how.mask_floor) for view in views]
        samples += rows * photo.repeats
        captions += [view.caption for view in views] * photo.repeats
        weights += [photo.weight] * len(views) * photo.repeats
        names += [photo.path.name] * len(views) * photo.repeats
    masked = any(photo.white is not None for photo in photos) or how.augment.scale_and_prefix
    return LatentSet(latents, masks if masked else None, samples, captions, weights, names)


def _mask(view: View, cells: torch.Size, floor: float) -> Tensor:
    """Weights (1, h, w) of a view's latent cells: 0 outside the photo, at least `floor` in it."""
    weights = torch.ones(1, *cells)
    if view.mask is not None:
        weights = mask_tensor(view.mask, cells).clamp(min=floor)
    return weights if view.valid is None else weights * mask_tensor(view.valid, cells)
