"""The stages before the first step: photos and captions are encoded, then the encoders leave.

A base's parts are loaded when they are used. So the autoencoder is in memory while photos are
encoded, text encoders while captions are, and the denoiser after that.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from rite_diffusion.backbones.conditioning import moved
from rite_diffusion.backbones.protocols import Backbone, Conditioning
from rite_diffusion.backbones.text_cache import cached_conditioning, caption_folder
from rite_diffusion.config import AugmentSection, TrainConfig, fill, words_of
from rite_diffusion.generation.denoise import encode_for_guidance
from rite_diffusion.methods.method import NAME
from rite_diffusion.photos.dataset import LatentSet, encode_photos
from rite_diffusion.training.plan import Plan
from rite_diffusion.training.precision import MixedPrecision
from rite_diffusion.training.settings import captions_come_first

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Encoded:
    """What the encoders of a base give for a training."""

    data: LatentSet
    held_out: LatentSet | None  # for the validation loss
    previews: list[Conditioning] | None  # of `preview_prompts`; None where the text may change


def encode(plan: Plan) -> Encoded:
    """The photos and captions of a plan, encoded; encoders that no step needs leave memory.

    Captions are left on disk, from where the method takes them.
    """
    backbone, config = plan.backbone, plan.config
    data = encode_photos(backbone, plan.photos, plan.encoding)
    plain = replace(plan.encoding, augment=AugmentSection())
    held_out = encode_photos(backbone, plan.held_out, plain) if plan.held_out else None
    release_autoencoder(backbone, config)
    if not captions_come_first(config):
        return Encoded(data, held_out, None)
    captions = [*data.captions, *(held_out.captions if held_out else [])]
    encode_captions(backbone, config, captions)
    previews = encode_previews(backbone, config)
    backbone.unload(backbone.text_encoders)
    return Encoded(data, held_out, previews)


def release_autoencoder(backbone: Backbone, config: TrainConfig) -> None:
    """Free the autoencoder's memory; for previews it comes back, on a GPU from main memory."""
    if config.previews.every:
        backbone.release(["vae"])
    else:
        backbone.unload(["vae"])


def encode_captions(backbone: Backbone, config: TrainConfig, captions: list[str]) -> None:
    """Compute and cache on disk the conditioning of every caption."""
    dropped = [""] if config.captions.dropout else []
    with MixedPrecision(backbone.device, config.precision).autocast(), torch.no_grad():
        for caption in dict.fromkeys([*captions, *dropped]):
            cached_conditioning(backbone, caption, caption_folder(config.cache))


def preview_prompts(config: TrainConfig) -> list[str]:
    """Every preview prompt for every concept."""
    prompts = config.previews.prompts
    return [fill(prompt, words_of(each)) for each in config.concepts() for prompt in prompts]


def encode_previews(backbone: Backbone, config: TrainConfig) -> list[Conditioning]:
    """The conditioning of each preview with guidance, in main memory."""
    with _triggers(backbone, config):
        return [
            moved(encode_for_guidance(backbone, [prompt], ""), CPU)
            for prompt in preview_prompts(config)
        ]


@contextmanager
def _triggers(backbone: Backbone, config: TrainConfig) -> Iterator[None]:
    """Prompts are read with the triggers kept whole, as they will be while the method trains."""
    backbone.triggers[NAME] = [concept.trigger for concept in config.concepts()]
    try:
        yield
    finally:
        backbone.triggers.pop(NAME)
