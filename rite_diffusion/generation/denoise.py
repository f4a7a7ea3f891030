"""Pictures of prompts under guidance, each a function of its own seed."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from PIL.Image import Image
from torch import Tensor

from rite_diffusion.backbones.protocols import Backbone, Conditioning
from rite_diffusion.photos.images import to_image

Predict = Callable[[Tensor, Tensor], Tensor]  # (latents (B, C, h, w), timestep) -> prediction


def initial_noise(backbone: Backbone, seeds: Sequence[int], width: int, height: int) -> Tensor:
    """Noise (B, C, h, w), each picture's drawn on the CPU from its own seed."""
    scale = backbone.pixels_per_latent
    shape = (backbone.latent_channels, height // scale, width // scale)
    draws = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(draws).to(backbone.device)


def guided_prediction(
    latents: Tensor,
    timestep: Tensor,
    *,
    backbone: Backbone,
    conditioning: Conditioning,
    guidance: float,
) -> Tensor:
    """The prediction (B, C, h, w) under guidance; conditioning is of `guidance_prompts`."""
    if backbone.guidance.kind != "classifier_free":
        times = timestep.expand(len(latents))
        return backbone.denoise(latents, times, conditioning, guidance).float()
    both = torch.cat([latents, latents])
    prediction = backbone.denoise(both, timestep.expand(len(both)), conditioning).float()
    uncond, cond = prediction.chunk(2)
    return backbone.guidance.combine(uncond, cond, guidance)


def guidance_prompts(backbone: Backbone, prompts: list[str], negative: str) -> list[str]:
    """What is encoded for guidance: [negatives; prompts], or prompts alone."""
    if backbone.guidance.kind != "classifier_free":
        return prompts
    return [negative] * len(prompts) + prompts


def guided(backbone: Backbone, prompts: list[str], negative: str, guidance: float) -> Predict:
    """What predicts with guidance, for one prompt per picture."""
    with torch.no_grad():
        conditioning = backbone.encode_prompts(guidance_prompts(backbone, prompts, negative))
    return partial(
        guided_prediction, backbone=backbone, conditioning=conditioning, guidance=guidance
    )


def conditional(backbone: Backbone, prompts: list[str]) -> Predict:
    """What predicts from the prompts alone, without guidance; one prompt per picture."""
    with torch.no_grad():
        conditioning = backbone.encode_prompts(prompts)
    return lambda latents, timestep: backbone.denoise(
        latents, timestep.expand(len(latents)), conditioning
    ).float()


@torch.no_grad()
def denoising(
    backbone: Backbone,
    predict: Predict,
    seeds: Sequence[int],
    *,
    steps: int,
    width: int | None = None,
    height: int | None = None,
) -> Iterator[Tensor]:
    """After each step, what the model takes the final latents (B, C, h, w) to be.

    The last are the pictures' own. Sides are in pixels.
    """
    side = backbone.resolution
    latents = initial_noise(backbone, seeds, width or side, height or side)
    rows, columns = latents.shape[-2:]
    scheduler = backbone.sampler(steps, (rows, columns))
    latents = latents * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        prediction = predict(scheduler.scale_model_input(latents, timestep), timestep)
        made = scheduler.step(prediction, timestep, latents)
        latents = made.prev_sample
        yield latents if timestep == scheduler.timesteps[-1] else made.pred_original_sample


def sample(
    backbone: Backbone,
    prompts: list[str],
    seeds: list[int],
    *,
    negative: str = "",
    steps: int = 25,
    guidance: float = 3.0,
    width: int | None = None,
    height: int | None = None,
) -> list[Image]:
    """One picture per prompt and seed, all in one batch; sides in pixels."""
    predict = guided(backbone, prompts, negative, guidance)
    *_, latents = denoising(backbone, predict, seeds, steps=steps, width=width, height=height)
    return pictures(backbone, latents)


def pictures(backbone: Backbone, latents: Tensor) -> list[Image]:
    """The pictures of latents (B, C, h, w)."""
    return [to_image(pixels) for pixels in backbone.decode(latents)]
