"""The validation loss: always at the same timesteps and noise, for a smooth curve."""

import math

import torch

from rite_diffusion.backbones.protocols import Backbone
from rite_diffusion.config import TrainConfig
from rite_diffusion.methods import Method
from rite_diffusion.photos.dataset import LatentSet
from rite_diffusion.seeding import Stream, generator
from rite_diffusion.training.batch import latents_shape, make_batch
from rite_diffusion.training.configured import step_loss

LEVELS = 8  # noise levels per sample, evenly spaced


@torch.no_grad()
def held_out_loss(
    backbone: Backbone, method: Method, data: LatentSet, config: TrainConfig
) -> float:
    """The mean loss of all samples of `data`, each at 8 evenly spaced noise levels."""
    total = 0.0
    places = (torch.arange(LEVELS) + 0.5) / LEVELS
    for index in range(len(data.samples)):
        indices = [index] * LEVELS
        draws = generator(config.seed, index, Stream.HELD_OUT)
        noise = torch.randn((LEVELS, *latents_shape(data, indices)), generator=draws)
        captions = [data.captions[index]] * LEVELS
        batch = make_batch(backbone, data, indices, captions, noise, noise, places)
        parts = batch.parts(LEVELS // math.gcd(LEVELS, config.batch))
        losses = [step_loss(backbone, method, part, config).item() for part in parts]
        total += sum(losses) / len(losses)
    return total / len(data.samples)
