"""What a text encoder is taught of pictures: the latents of the scene that a caption tells.

A denoiser of this size does not learn in a million pictures what a hundred things look like. A text
encoder learns it by plain regression, and the denoiser learns to draw what the states show.
"""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor

from . import emoji, held_out, world
from .machine import Machine

SIDE = 8  # patches of a picture's side, 2x2 latents each
PATCHES = SIDE * SIDE


@torch.no_grad()
def table(work: Path, autoencoder: AutoencoderKL, machine: Machine) -> Tensor:
    """Latents (nouns, places, colours, C, 16, 16) of every noun on every plain ground.

    Made once and kept in `work`.
    """
    path = work / "latents-plain.safetensors"
    if not path.exists():
        style, parts = next(iter(world.STYLES)), []
        for name in world.NOUNS.values():
            sprite = emoji.sprites().image(style, name)
            drawn = [
                world.draw(None, [sprite], colour, place, aligned=True)
                for place in world.PLACES
                for colour in world.COLOURS
            ]
            with machine.autocast():
                pixels = held_out.as_pixels(np.stack(drawn)).to(machine.device)
                parts.append(autoencoder.encode(pixels).latent_dist.mean.half().cpu())
        found = torch.stack(parts).unflatten(1, (len(world.PLACES), len(world.COLOURS)))
        save_file({"latents": found.contiguous()}, path)
    return load_file(path)["latents"].float()


def latents_of(scene: world.Description, latents: Tensor) -> Tensor:
    """Latents (C, 16, 16) of a described scene; a pair is the halves of two scenes.

    `latents` is what `table` gives.
    """
    nouns, places, colours = list(world.NOUNS), list(world.PLACES), list(world.COLOURS)
    colour = colours.index(scene.colour)
    if len(scene.nouns) == 1:
        return latents[nouns.index(scene.nouns[0]), places.index(scene.place), colour]
    left, right = (
        latents[nouns.index(noun), places.index(place), colour]
        for noun, place in zip(scene.nouns, ("left", "right"), strict=True)
    )
    half = left.shape[-1] // 2
    return torch.cat([left[..., :half], right[..., half:]], -1)


def patches(latents: Tensor) -> Tensor:
    """Latents (n, C, 16, 16) as (n, PATCHES, 4C), row by row."""
    parts = latents.unflatten(2, (SIDE, -1)).unflatten(4, (SIDE, -1))  # n, C, row, y, column, x
    return parts.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
