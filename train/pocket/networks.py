"""The networks of the embedded bases, all of them classes of diffusers and transformers."""

import math

import torch
from diffusers import AutoencoderKL

from . import world

LATENT_CHANNELS = 16
LATENT_NOISE = 0.05  # standard deviation of the noise that the decoder learns to bear


def new_autoencoder(
    widths: tuple[int, ...] = (16, 32, 64, 128), latent_channels: int = LATENT_CHANNELS
) -> AutoencoderKL:
    """Autoencoder: 128x128 pixels to 16x16 latents and back.

    Most of its weights work at 16x16 and 32x32, where they cost little. Few groups of channels
    share a norm, so that norms change a picture's colours little.
    """
    autoencoder = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=2,
        mid_block_add_attention=False,
        sample_size=world.SIZE,
        scaling_factor=1.0,
    )
    with torch.no_grad():  # the posterior's width is a constant, not learned
        autoencoder.quant_conv.weight[latent_channels:] = 0
        autoencoder.quant_conv.bias[latent_channels:] = 2 * math.log(LATENT_NOISE)
    return autoencoder
