"""What a single-file checkpoint holds, by its header alone: tensor names, shapes, metadata."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import count, takewhile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rite_diffusion.types import BackboneError

UNET = "model.diffusion_model."
VAE = "first_stage_model."
CLIP = "cond_stage_model.transformer."
PARTS = {UNET: "UNet", VAE: "autoencoder", CLIP: "CLIP text encoder"}

# Names that begin so belong to something other than SD1: what it is and what to do.
FOREIGN = {
    "conditioner.embedders.": "an SDXL file; use its diffusers folder",
    "cond_stage_model.model.": "an SD2.x file; use its diffusers folder",
    "control_model.": "a ControlNet; pass a Stable Diffusion 1.x checkpoint",
    "lora_": "a LoRA adapter; pass it as an adapter and its base model as the base",
    "down_blocks.": "a diffusers UNet alone; pass the folder that holds model_index.json",
    "double_blocks.": "a Flux file; pass a Stable Diffusion 1.x checkpoint",
    f"{UNET}double_blocks.": "a Flux file; pass a Stable Diffusion 1.x checkpoint",
    f"{UNET}joint_blocks.": "an SD3 file; pass a Stable Diffusion 1.x checkpoint",
}

# Tensors that a pipeline does without.
IDLE = re.compile(
    r"(first_stage_model\.)?model_ema\."  # running means of the weights
    r"|first_stage_model\.loss\."  # the autoencoder's critic
    r"|(betas|logvar|scale_factor|posterior_\w+|\w*alphas_cumprod\w*)$"  # SD1's noise schedule
    r"|(v_pred|ztsnr)$"  # empty marks of another objective and schedule
    r"|cond_stage_model\.(.+\.)?(position_ids|logit_scale|text_projection(\.weight)?)$"
)


@dataclass(frozen=True)
class Checkpoint:
    """The header of a `.safetensors` file."""

    path: Path
    shapes: dict[str, tuple[int, ...]]  # of the tensors, by name
    metadata: dict[str, str]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a matrix or convolution of SD1; raises BackboneError where the file has none."""
        if len(self.shapes.get(name, ())) < 2:
            raise BackboneError(
                f"{self.path} lacks the weight '{name}': it is not a whole Stable Diffusion 1.x "
                "checkpoint. Download it again, or pass another."
            )
        return self.shapes[name]

    def has(self, start: str) -> bool:
        """Whether any tensor's name begins so."""
        return any(name.startswith(start) for name in self.shapes)

    def length(self, start: str) -> int:
        """How many parts a numbered list ("blocks.{}.") has, counted up from 0 to the first gap."""
        return sum(1 for _ in takewhile(self.has, (start.format(i) for i in count())))

    def read(self, start: str, dtype: torch.dtype) -> dict[str, Tensor]:
        """Copies in `dtype` of the tensors whose names begin so, idle ones left out."""
        names = [name for name in self.shapes if name.startswith(start) and not IDLE.match(name)]
        with safe_open(self.path, framework="pt") as file:
            return {name: file.get_tensor(name).to(dtype, copy=True) for name in names}


def read_header(path: Path) -> Checkpoint:
    """The header of a `.safetensors` file; raises BackboneError for anything else."""
    if path.suffix.lower() != ".safetensors":
        raise BackboneError(
            f"{path} does not end in .safetensors. A .ckpt, .pt or .bin file is a pickle, which "
            "can run code when opened: convert it on a machine you can lose, then pass that file."
        )
    if not path.is_file():
        raise BackboneError(f"there is no file {path}. Pass the path of a .safetensors checkpoint.")
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
            return Checkpoint(path, shapes, file.metadata() or {})
    except SafetensorError as error:
        raise BackboneError(
            f"{path} is not a safetensors file: {_diagnosis(path, error)}"
        ) from None


def _diagnosis(path: Path, error: SafetensorError) -> str:
    """What a file that does not open seems to be, and what to do."""
    with path.open("rb") as file:
        head = file.read(64).lstrip().lower()
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer to one. Run `git lfs pull` in its folder."
    if head.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "it is a web page. Download it again, signed in if the site asks for that."
    if head.startswith((b"pk\x03\x04", b"\x80")):
        return "it is a pickle or a zip under another name. Pass a real .safetensors file."
    size = path.stat().st_size
    return f"its {size:,} bytes are damaged or cut short ({error}). Download it again."


def check_parts(checkpoint: Checkpoint) -> None:
    """Raises BackboneError unless the file holds the three parts of SD1 and nothing else."""
    for start, kind in FOREIGN.items():
        if checkpoint.has(start):
            raise BackboneError(f"{checkpoint.path}: this is {kind} (found '{start}…')")
    absent = [f"{part} ({start}…)" for start, part in PARTS.items() if not checkpoint.has(start)]
    if absent:
        raise BackboneError(
            f"{checkpoint.path} has no {' and no '.join(absent)}: it is not a whole Stable "
            "Diffusion 1.x checkpoint. Pass one with UNet, autoencoder and text encoder."
        )
    names = (name for name in checkpoint.shapes if not name.startswith(tuple(PARTS)))
    check_names(checkpoint.path, {"unexpected": [name for name in names if not IDLE.match(name)]})


def check_names(path: Path, faults: Mapping[str, Collection[str]]) -> None:
    """Raises BackboneError that counts the faulty tensors by kind and names the first few."""
    found = [
        f"{len(names)} {fault} ({', '.join(sorted(names)[:3])}{', …' if len(names) > 3 else ''})"
        for fault, names in faults.items()
        if names
    ]
    if found:
        raise BackboneError(
            f"the tensors of {path} are not those of Stable Diffusion 1.x: {'; '.join(found)}. "
            "Pass an unmodified SD1.x checkpoint, or the model's diffusers folder."
        )
