"""The denoising loop, with guidance; each picture depends on its own seed."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from PIL.Image import Image
from torch import Tensor

from rite_diffusion.backbones.protocols import Backbone, Conditioning
from rite_diffusion.photos.images import to_image

Predict = Callable[[Tensor, Tensor], Tensor]  # (latents (B, C, h, w), timestep) -> prediction


def initial_noise(backbone: Backbone, seeds: Sequence[int], width: int, height: int) -> Tensor:
    """Standard normal noise (B, C, h, w), drawn on the CPU from each picture's own seed."""
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
    """The prediction (B, C, h, w) with guidance; conditioning is of `guidance_prompts`."""
    if backbone.guidance.kind != "classifier_free":
        times = timestep.expand(len(latents))
        return backbone.denoise(latents, times, conditioning, guidance).float()
    both = torch.cat([latents, latents])
    prediction = backbone.denoise(both, timestep.expand(len(both)), conditioning).float()
    uncond, cond = prediction.chunk(2)
    return backbone.guidance.combine(uncond, cond, guidance)


def guidance_prompts(backbone: Backbone, prompts: list[str], negative: str) -> list[str]:
    """The prompts to encode for guidance: [negatives; prompts], or the prompts only."""
    if backbone.guidance.kind != "classifier_free":
        return prompts
    return [negative] * len(prompts) + prompts


@torch.no_grad()
def encode_for_guidance(backbone: Backbone, prompts: list[str], negative: str) -> Conditioning:
    """The conditioning of `guidance_prompts`."""
    return backbone.encode_prompts(guidance_prompts(backbone, prompts, negative))


def guided(backbone: Backbone, prompts: list[str], negative: str, guidance: float) -> Predict:
    """A predictor with guidance, for one prompt per picture."""
    conditioning = encode_for_guidance(backbone, prompts, negative)
    return partial(
        guided_prediction, backbone=backbone, conditioning=conditioning, guidance=guidance
    )


def conditional(backbone: Backbone, prompts: list[str]) -> Predict:
    """A predictor conditioned on the prompts without guidance; one prompt per picture."""
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
    """The estimate of the final latents (B, C, h, w) after each step; the last are the result.

    `width` and `height` are in pixels and default to the base's resolution.
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
    """One picture per pair of prompt and seed, drawn in one batch; sides are in pixels."""
    conditioning = encode_for_guidance(backbone, prompts, negative)
    return sample_encoded(
        backbone, conditioning, seeds, steps=steps, guidance=guidance, width=width, height=height
    )


def sample_encoded(
    backbone: Backbone,
    conditioning: Conditioning,
    seeds: list[int],
    *,
    steps: int = 25,
    guidance: float = 3.0,
    width: int | None = None,
    height: int | None = None,
) -> list[Image]:
    """One picture per seed, as `sample` draws; `conditioning` is of `encode_for_guidance`."""
    predict = partial(
        guided_prediction, backbone=backbone, conditioning=conditioning, guidance=guidance
    )
    *_, latents = denoising(backbone, predict, seeds, steps=steps, width=width, height=height)
    return decode_pictures(backbone, latents)


def decode_pictures(backbone: Backbone, latents: Tensor) -> list[Image]:
    """The pictures decoded from latents (B, C, h, w)."""
    return [to_image(pixels) for pixels in backbone.decode(latents)]
