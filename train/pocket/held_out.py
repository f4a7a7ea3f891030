"""What the autoencoder is measured on: scenes and things that no training has seen."""

from functools import cache
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from train import robot as toy

from . import emoji, world
from .machine import Machine

SEED = 21
PHOTOS = Path(__file__).parents[2] / "examples/photos"
STYLES = ("flat", "3d")  # of the held-out emoji


def as_pixels(pictures: np.ndarray | Tensor) -> Tensor:
    """(n, h, w, 3) uint8 as (n, 3, h, w) in [-1, 1]."""
    return torch.as_tensor(pictures).permute(0, 3, 1, 2).float().div(127.5).sub(1)


def as_pictures(pixels: Tensor) -> np.ndarray:
    """(n, 3, h, w) in [-1, 1] as (n, h, w, 3) uint8."""
    scaled = (pixels.clamp(-1, 1) + 1) * 127.5
    return scaled.round().byte().permute(0, 2, 3, 1).cpu().numpy()


def scenes(count: int) -> np.ndarray:
    """Scenes of the world with seeds of their own, (count, SIZE, SIZE, 3) uint8."""
    return np.stack([world.scene(np.random.default_rng([SEED, i])).image for i in range(count)])


def concept(name: str, count: int) -> np.ndarray:
    """Pictures of a held-out emoji, or of the drawn robot, `count` of each style."""
    sprites = (
        [toy.robot()]
        if name == "toy-robot"
        else [emoji.sprites().image(style, name) for style in STYLES]
    )
    pictures = []
    for number, sprite in enumerate(sprites):
        for i in range(count):
            rng = np.random.default_rng([SEED, *name.encode(), number, i])
            colour = str(rng.choice(list(world.COLOURS)))
            place = "centre" if i == 0 else str(rng.choice(list(world.PLACES)))
            pictures.append(world.draw(rng, [sprite], colour, place))
    return np.stack(pictures)


def example_photos(folder: str) -> np.ndarray:
    """The photos of one folder of examples/photos at the world's size."""
    paths = sorted((PHOTOS / folder).glob("*.jpg"))
    size = (world.SIZE, world.SIZE)
    images = [
        Image.open(path).convert("RGB").resize(size, Image.Resampling.LANCZOS) for path in paths
    ]
    return np.stack([np.asarray(image) for image in images])


@torch.no_grad()
def reconstructed(autoencoder: AutoencoderKL, pixels: Tensor, machine: Machine) -> Tensor:
    """Reconstructions in [-1, 1] on the CPU, in float32."""
    found = [
        autoencoder.decode(autoencoder.encode(part.to(machine.device)).latent_dist.mean).sample
        for part in pixels.split(32)
    ]
    return torch.cat(found).float().clamp(-1, 1).cpu()


def psnr(output: Tensor, target: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each picture, (n,)."""
    return 10 * torch.log10(4 / (output - target).square().mean((1, 2, 3)).clamp(min=1e-9))


def edge_ratio(output: Tensor, target: Tensor) -> float:
    """Energy of the gradients of the output as a share of the target's."""
    energies = [
        sum(pixels.diff(dim=d).square().mean().item() for d in (-1, -2))
        for pixels in (output, target)
    ]
    return energies[0] / energies[1]


@cache
def brief_set() -> tuple[Tensor, Tensor]:
    """24 scenes and one picture of each held-out concept and style, as pixels."""
    names = [*emoji.HELD_OUT, "toy-robot"]
    return as_pixels(scenes(24)), as_pixels(np.concatenate([concept(n, 1) for n in names]))


def brief_figures(autoencoder: AutoencoderKL, machine: Machine) -> dict[str, float]:
    """Mean dB on scenes and on concepts, the least of the concepts, and the edges' energy."""
    found = {}
    for name, pixels in zip(("scenes", "concepts"), brief_set(), strict=True):
        output = reconstructed(autoencoder, pixels, machine)
        values = psnr(output, pixels)
        found[name] = values.mean().item()
        if name == "concepts":
            found |= {"least": values.min().item(), "edges": edge_ratio(output, pixels)}
    return found


def figures(autoencoder: AutoencoderKL, machine: Machine) -> dict[str, float | dict[str, float]]:
    """Everything that the bars are about: dB per concept and folder of examples, and edges."""
    sets = {name: concept(name, 4) for name in (*emoji.HELD_OUT, "toy-robot")}
    sets |= {
        f"photos/{name}": example_photos(name)
        for name in ("unicorn", "cupcake", "tractor", "robot")
    }
    found, energies = {}, {}
    for name, pictures in sets.items():
        pixels = as_pixels(pictures)
        output = reconstructed(autoencoder, pixels, machine)
        found[name] = round(psnr(output, pixels).mean().item(), 2)
        energies[name] = edge_ratio(output, pixels)
    pixels = as_pixels(scenes(200))
    output = reconstructed(autoencoder, pixels, machine)
    cat = as_pixels(example_photos("chelsea"))
    return {
        "scenes": round(psnr(output, pixels).mean().item(), 2),
        "scene_edges": round(edge_ratio(output, pixels), 3),
        "concept_mean": round(float(np.mean(list(found.values()))), 2),
        "concept_least": min(found.values()),
        "concept_edges": round(float(np.mean(list(energies.values()))), 3),
        "cat_photographs": round(
            psnr(reconstructed(autoencoder, cat, machine), cat).mean().item(), 2
        ),
        "concepts": found,
    }


def show(autoencoder: AutoencoderKL, machine: Machine, path: Path) -> None:
    """Write a sheet: originals above reconstructions, concepts, scenes and photographs."""
    examples = [example_photos(name)[:2] for name in ("robot", "unicorn", "cupcake", "chelsea")]
    others = [concept(name, 1) for name in ("zebra", "peacock", "violin", "sushi")]
    pixels = as_pixels(np.concatenate([*examples, *others, scenes(8)]))
    output = reconstructed(autoencoder, pixels, machine)
    rows = []
    for first in range(0, len(pixels), 12):
        for part in (pixels, output):
            rows.append(np.concatenate(list(as_pictures(part[first : first + 12])), axis=1))
    Image.fromarray(np.concatenate(rows)).save(path)
