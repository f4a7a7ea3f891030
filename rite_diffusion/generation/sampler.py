"""Pictures of prompts by classifier-free guidance, each a function of its own seed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from PIL.Image import Image
from torch import Tensor

from rite_diffusion.photos.images import to_image
from rite_diffusion.types import Backbone, Conditioning, ConfigError


def initial_noise(backbone: Backbone, seeds: list[int], width: int, height: int) -> Tensor:
    """Noise (B, C, h, w), each picture's drawn on the CPU from its own seed."""
    scale = backbone.pixels_per_latent
    shape = (backbone.latent_channels, height // scale, width // scale)
    draws = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(draws).to(backbone.device)


def guided_prediction(
    backbone: Backbone,
    latents: Tensor,
    timestep: Tensor,
    conditioning: Conditioning,
    guidance: float,
) -> Tensor:
    """Uncond + w (cond - uncond) (Ho & Salimans 2022); conditioning is [uncond; cond], (2B, …)."""
    both = torch.cat([latents, latents])
    prediction = backbone.denoise(both, timestep.expand(len(both)), conditioning).float()
    uncond, cond = prediction.chunk(2)
    return uncond + guidance * (cond - uncond)


@dataclass(frozen=True)
class Sampling:
    """How a picture is drawn; sides in pixels, None for the backbone's own."""

    negative: str
    steps: int
    guidance: float
    width: int | None = None
    height: int | None = None

    def size(self, backbone: Backbone) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.width or backbone.resolution, self.height or backbone.resolution


def checked_size(backbone: Backbone, width: int | None, height: int | None) -> tuple[int, int]:
    """Width and height in pixels, the base's where None; ConfigError where it cannot draw them."""
    width, height = width or backbone.resolution, height or backbone.resolution
    for side in (width, height):
        if side % backbone.multiple or not 0 < side <= 4096:
            raise ConfigError(f"side {side} is not a multiple of {backbone.multiple} up to 4096")
    return width, height


@torch.no_grad()
def draw(
    backbone: Backbone,
    conditioning: Conditioning,
    seeds: Sequence[int],
    sampling: Sampling,
    listen: Callable[[int], None] = lambda step: None,
) -> list[Image]:
    """One picture per seed, all in one batch; conditioning is [uncond; cond], (2B, …)."""
    latents = initial_noise(backbone, list(seeds), *sampling.size(backbone))
    scheduler = backbone.new_scheduler()
    scheduler.set_timesteps(sampling.steps, device=backbone.device)
    latents = latents * scheduler.init_noise_sigma
    for done, timestep in enumerate(scheduler.timesteps, start=1):
        noisy = scheduler.scale_model_input(latents, timestep)
        prediction = guided_prediction(backbone, noisy, timestep, conditioning, sampling.guidance)
        latents = scheduler.step(prediction, timestep, latents).prev_sample
        listen(done)
    return [to_image(pixels) for pixels in backbone.decode(latents)]


@torch.no_grad()
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
    listen: Callable[[int], None] = lambda step: None,
) -> list[Image]:
    """One picture per prompt and seed, all in one batch; sides in pixels."""
    conditioning = backbone.encode_prompts([negative] * len(prompts) + prompts)
    sampling = Sampling(negative, steps, guidance, width, height)
    return draw(backbone, conditioning, seeds, sampling, listen)
