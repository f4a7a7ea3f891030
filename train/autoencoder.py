"""The autoencoder of the pocket base: 64x64 pixels to 16x16 latents of 8 channels and back."""

import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

import world
from networks import (
    LATENT_NOISE,
    as_images,
    as_tensor,
    load_state,
    new_vae,
    report,
    save_state,
    set_rate,
)


def image_pool(count: int, seed: int) -> np.ndarray:
    """Images for the autoencoder, (count, 64, 64, 3) uint8."""
    sprites = world.all_sprites()
    return np.stack(
        [world.any_image(np.random.default_rng([seed, i]), sprites) for i in range(count)]
    )


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """L1 + MSE + half the L1 of the image gradients."""
    edges = sum((output.diff(dim=d) - target.diff(dim=d)).abs().mean() for d in (-1, -2))
    return F.l1_loss(output, target) + F.mse_loss(output, target) + 0.5 * edges


def psnr(vae: AutoencoderKL, images: np.ndarray) -> float:
    """Mean peak signal-to-noise ratio of reconstructions in dB."""
    target = as_tensor(images)
    with torch.no_grad():
        output = vae.decode(vae.encode(target).latent_dist.mean).sample.clamp(-1, 1)
    return (10 * torch.log10(4 / (output - target).square().mean((1, 2, 3)))).mean().item()


def train_vae(work: Path, steps: int, stage: str = "vae", rate: float = 2e-3) -> None:
    """Train the autoencoder; as stage `decoder` only its decoder, so that latents stay."""
    vae = new_vae().to(memory_format=torch.channels_last)
    if stage == "decoder":
        load_state(work / "vae.safetensors", None, vae=vae)
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    weights = [parameter for parameter in vae.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, rate, betas=(0.9, 0.99), weight_decay=0.0)
    path = work / f"{stage}.safetensors"
    first = load_state(path, optimizer, vae=vae)
    if first >= steps:
        return
    pool, held_out = image_pool(24_000, seed=1), image_pool(200, seed=2)
    start = time.time()
    for step in range(first, steps):
        set_rate(optimizer, rate, step, steps)
        generator = torch.Generator().manual_seed(step)
        images = as_tensor(pool[torch.randint(len(pool), (16,), generator=generator).numpy()])
        images = images.flip(-1) if step % 2 else images
        images = images.to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            latents = vae.encode(images).latent_dist.mean
            noise = torch.randn(latents.shape, generator=generator)
            output = vae.decode(latents + LATENT_NOISE * noise * latents.detach().std()).sample
        loss = reconstruction_loss(output.float(), images) + 1e-3 * latents.float().square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 250 == 0 or step + 1 == steps:
            report(
                stage,
                step + 1,
                steps,
                start,
                step + 1 - first,
                loss=loss.item(),
                psnr=psnr(vae, held_out),
            )
            save_state(path, step + 1, optimizer, vae=vae)
            show_reconstructions(vae, held_out[:12], work / f"{stage}.png")


def show_reconstructions(vae: AutoencoderKL, images: np.ndarray, path: Path) -> None:
    """Write originals above their reconstructions."""
    with torch.no_grad():
        output = as_images(vae.decode(vae.encode(as_tensor(images)).latent_dist.mean).sample)
    rows = [np.concatenate(list(row), axis=1) for row in (images, output)]
    sheet = Image.fromarray(np.concatenate(rows))
    sheet.resize((sheet.width * 2, sheet.height * 2)).save(path)


@torch.no_grad()
def standardise(vae: AutoencoderKL, images: np.ndarray) -> None:
    """Fold each latent channel's mean and deviation into the 1x1 convolutions around the latents.

    Afterwards latents have mean 0 and deviation 1, so the pipeline's scaling factor is 1.
    """
    latents = vae.encode(as_tensor(images)).latent_dist.mean
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    vae.quant_conv.weight[:8] /= std[:, None, None, None]
    vae.quant_conv.bias[:8] = (vae.quant_conv.bias[:8] - mean) / std
    vae.post_quant_conv.bias += vae.post_quant_conv.weight[..., 0, 0] @ mean
    vae.post_quant_conv.weight *= std[None, :, None, None]


def load_vae(work: Path) -> AutoencoderKL:
    """The autoencoder with standardised latents: the refined decoder where that stage has run."""
    vae = new_vae()
    refined = work / "decoder.safetensors"
    load_state(refined if refined.exists() else work / "vae.safetensors", None, vae=vae)
    standardise(vae, image_pool(1000, seed=3))
    return vae.eval()
