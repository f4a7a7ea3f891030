"""Training of a base's text encoder and denoiser on encoded scenes.

python -m train.pocket unet --work DIR
python -m train.pocket flow --work DIR
"""

import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from . import canvas, held_out, text, world
from .bases import BASES, GUIDANCE, Base, Sizes
from .machine import Machine, Progress, load_state, rate_at, save_state, set_rate, update_average
from .muon import Muon, split_weights

SEED = 41  # of the scenes
DROPPED = 0.1  # share of scenes whose caption is left out, for guidance


@dataclass(frozen=True)
class Settings:
    """One training of a base."""

    pictures: int = 200_000  # seen
    scenes: int = 12_000  # different ones
    captions: int = 300_000  # that teach the text encoder
    batch: int = 32
    rate: float = 6e-4  # of AdamW
    muon_rate: float = 0.01
    decay: float = 0.9993  # of the average of the weights
    unet_widths: tuple[int, ...] = (64, 96, 192)
    width: int = 192
    layers: int = 8
    text_width: int = 256
    text_layers: int = 4

    @property
    def sizes(self) -> Sizes:
        """The sizes of the networks."""
        return Sizes(self.unet_widths, self.width, self.layers, self.text_width, self.text_layers)


@torch.no_grad()
def encode_scenes(
    work: Path, autoencoder: AutoencoderKL, count: int, machine: Machine
) -> tuple[Tensor, list[str]]:
    """Latents (count, C, 16, 16) fp16 and captions of scenes, made once and kept in `work`."""
    path = work / f"latents-{count}.safetensors"
    described = [world.described(np.random.default_rng([SEED, i])) for i in range(count)]
    if not path.exists():
        progress, parts = Progress("latents", 0, count), []
        for first in range(0, count, 64):
            chosen = range(first, min(first + 64, count))
            drawn = [world.scene(np.random.default_rng([SEED, i])).image for i in chosen]
            pixels = held_out.as_pixels(np.stack(drawn)).to(machine.device)
            with machine.autocast():
                latents = autoencoder.encode(pixels).latent_dist.mean
            parts.append(latents.half().cpu())
            if progress.is_due(chosen.stop):
                progress.report(chosen.stop, {})
        save_file({"latents": torch.cat(parts).contiguous()}, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)
    return load_file(path)["latents"], [scene.caption for scene in described]


def prepared(
    work: Path, name: str, autoencoder: AutoencoderKL, settings: Settings, machine: Machine
) -> Base:
    """The base with its text encoder taught, from `work` where that was done before."""
    torch.manual_seed(0)
    base = BASES[name](work, autoencoder.config.latent_channels, settings.sizes, machine)
    shown = canvas.table(work, autoencoder, machine)
    path = work / f"{name}-text.safetensors"
    text.teach(base.text_encoder, base.taught_states, shown, machine, settings.captions, path)
    base.text_encoder.requires_grad_(False).eval()
    return base


def all_states(base: Base, captions: list[str]) -> list[Tensor]:
    """The text states of every caption."""
    found = []
    for first in range(0, len(captions), 256):
        found += base.states(captions[first : first + 256])
    return found


@torch.no_grad()
def use_of_captions(
    base: Base, latents: Tensor, states: list[Tensor], empty: Tensor
) -> dict[str, float]:
    """Mean errors with the caption (`told`) and without (`untold`), on the same noise.

    As long as they are equal the denoiser only removes noise, and longer training of the same kind
    helps little: a UNet's pictures were blots after 200,000 pictures for that reason.
    """
    said = {"told": states, "untold": [empty] * len(states)}
    return {
        kind: base.errors(latents, each, torch.Generator().manual_seed(0)).mean().item()
        for kind, each in said.items()
    }


def train(
    work: Path, name: str, autoencoder: AutoencoderKL, settings: Settings, machine: Machine
) -> None:
    """Train the base `name` until `settings.pictures`, from the state in `work` if it is there."""
    base = prepared(work, name, autoencoder, settings, machine)
    latents, captions = encode_scenes(work, autoencoder, settings.scenes, machine)
    states, empty = all_states(base, captions), base.states([""])[0]
    average = copy.deepcopy(base.denoiser).requires_grad_(False)
    weights = list(base.denoiser.parameters())
    inner, others = split_weights(base.denoiser)
    rates = {"muon": settings.muon_rate, "adamw": settings.rate}
    optimizers = {
        "muon": Muon(inner, settings.muon_rate),
        "adamw": torch.optim.AdamW(others, settings.rate, betas=(0.9, 0.99), weight_decay=0.01),
    }
    path, modules = work / f"{name}.safetensors", {"denoiser": base.denoiser, "average": average}
    seen = load_state(path, optimizers, modules)
    progress, losses = Progress(name, seen, settings.pictures), []
    while seen < settings.pictures:
        generator = torch.Generator().manual_seed(seen)
        chosen = torch.randint(len(latents), (settings.batch,), generator=generator)
        dropped = torch.rand(settings.batch, generator=generator) < DROPPED
        said = [empty if d else states[i] for i, d in zip(chosen.tolist(), dropped, strict=True)]
        loss = base.errors(latents[chosen].float().to(machine.device), said, generator).mean()
        base.denoiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        for kind, optimizer in optimizers.items():
            set_rate(optimizer, rate_at(rates[kind], seen, settings.pictures))
            optimizer.step()
        update_average(average, base.denoiser, seen // settings.batch, settings.decay)
        seen += settings.batch
        losses.append(loss.item())
        if progress.is_due(seen):
            first = latents[:64].float().to(machine.device)
            used = use_of_captions(base, first, states[:64], empty)
            progress.report(seen, {"loss": sum(losses) / len(losses), **used})
            losses.clear()
            save_state(path, seen, optimizers, modules)
            show(base, autoencoder, average, GUIDANCE[name], work / f"{name}-sheet.png")
    export(base, autoencoder, average, work / name)


def export(base: Base, autoencoder: AutoencoderKL, denoiser: nn.Module, folder: Path) -> None:
    """Write a base in fp16 as a folder that plain diffusers opens."""
    parts = [copy.deepcopy(module).half() for module in (autoencoder, denoiser)]
    pipeline = base.pipeline(*parts)
    pipeline.text_encoder = copy.deepcopy(base.text_encoder).half()
    pipeline.save_pretrained(folder)


SHEET = (
    "a cat on a blue background",
    "a robot on a yellow background",
    "a house",
    "a small car on a red background",
    "an owl on the left on a green background",
    "a pizza on a black background",
    "a cat on the left and a house on the right on a red background",
    "an apple on the left and a bus on the right on a white background",
    "a castle on a purple background",
    "a rose on a gray background",
    "a bicycle beside a tree on a cyan background",
    "a lion and a star on an orange background",
)


def show(
    base: Base, autoencoder: AutoencoderKL, denoiser: nn.Module, guidance: float, path: Path
) -> None:
    """Write a sheet of pictures of the prompts of SHEET."""
    pipeline = base.pipeline(autoencoder, denoiser)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        list(SHEET),
        num_inference_steps=25,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(0),
        height=world.SIZE,
        width=world.SIZE,
    ).images
    sheet = Image.new("RGB", (6 * world.SIZE, 2 * world.SIZE))
    for i, image in enumerate(images):
        sheet.paste(image, (i % 6 * world.SIZE, i // 6 * world.SIZE))
    sheet.save(path)
