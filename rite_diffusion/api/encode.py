"""`rite.encode_photos`: a photo folder as latents, for a training loop of one's own."""

from pathlib import Path

from rite_diffusion.backbones.protocols import Backbone
from rite_diffusion.config import TrainConfig
from rite_diffusion.files.writing import cache_folder, user_path
from rite_diffusion.photos.dataset import Encoding, LatentSet, training_side
from rite_diffusion.photos.dataset import encode_photos as encode
from rite_diffusion.photos.folder import read_folder
from rite_diffusion.types import Concept


def encode_photos(
    backbone: Backbone,
    photos: str | Path,
    *,
    trigger: str,
    class_noun: str,
    resolution: int | None = None,
    buckets: bool = False,
    cache: bool = True,
) -> LatentSet:
    """The photos of a folder as latents (C, h, w) with captions, in memory.

    Photos without a caption file get captions from the default templates. `resolution` is in pixels
    and defaults to the backbone's; with `buckets` photos keep their shapes, else they are cropped
    to squares. `cache` keeps latents on disk for the next call. Raises PhotoFolderError for a
    folder that cannot be trained on, and ConfigError for a resolution that does not fit the
    backbone.
    """
    concept = Concept(trigger, class_noun)
    templates = TrainConfig.model_fields["templates"].default
    found = read_folder(user_path(photos), concept, templates).photos
    how = Encoding(
        training_side(backbone, resolution),
        buckets,
        cache=cache_folder() / "latents" if cache else None,
    )
    return encode(backbone, found, how)
