"""What a model says of one fixed noisy picture: here, and in plain diffusers with an adapter."""

from pathlib import Path

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline

from rite_diffusion.backbones.protocols import Backbone

PROMPT = "a red cat"
TIME = torch.tensor([500])


def noisy_latents(channels: int, cells: int = 16) -> torch.Tensor:
    """The noisy picture (1, channels, cells, cells)."""
    draws = torch.Generator().manual_seed(1)
    return torch.randn(1, channels, cells, cells, generator=draws)


@torch.no_grad()
def prediction(backbone: Backbone, cells: int = 16) -> torch.Tensor:
    """What a backbone says, with what is attached to it (1, channels, cells, cells)."""
    noisy = noisy_latents(backbone.latent_channels, cells)
    return backbone.denoise(noisy, TIME, backbone.encode_prompts([PROMPT]))


@torch.no_grad()
def prediction_of(pipeline: DiffusionPipeline) -> torch.Tensor:
    """What a diffusers pipeline says, Stable Diffusion or SDXL (1, channels, cells, cells)."""
    noisy = noisy_latents(pipeline.unet.config.in_channels)
    settings = {"num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    found = pipeline.encode_prompt(PROMPT, device="cpu", **settings)
    extra = {}
    if isinstance(pipeline, StableDiffusionXLPipeline):
        sizes = torch.tensor([[128, 128, 0, 0, 128, 128]])
        extra = {"added_cond_kwargs": {"text_embeds": found[2], "time_ids": sizes}}
    return pipeline.unet(noisy, TIME, found[0], **extra).sample


def prediction_in_diffusers(base: Path, file: Path) -> torch.Tensor:
    """What a Stable Diffusion folder says with an adapter file, both opened by plain diffusers."""
    pipeline = StableDiffusionPipeline.from_pretrained(base, torch_dtype=torch.float32)
    pipeline.load_lora_weights(str(file.parent), weight_name=file.name, use_safetensors=True)
    return prediction_of(pipeline)
