"""The header of a single-file checkpoint, and the family and parts that it shows."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import count, takewhile
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from rite_diffusion.errors import BackboneError
from rite_diffusion.files.writing import reading

Model = TypeVar("Model", bound=nn.Module)

UNET = "model.diffusion_model."
VAE = "first_stage_model."
CLIP = "cond_stage_model.transformer."
OPEN_CLIP = "cond_stage_model.model."
XL_CLIP, XL_OPEN_CLIP = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."


@dataclass(frozen=True)
class Layout:
    """A family of checkpoints: its text encoders, and constants that are not in the file."""

    title: str
    encoders: dict[str, str]  # prefix of the tensors' names -> what the part is
    pixels: int  # side of the pictures that it was trained on
    latent_scale: float

    def parts(self) -> dict[str, str]:
        """Prefix of the tensors' names -> what the part is, for every part."""
        return {UNET: "UNet", VAE: "autoencoder"} | self.encoders


SD1 = Layout("Stable Diffusion 1.x", {CLIP: "CLIP text encoder"}, 512, 0.18215)
SD2 = Layout("Stable Diffusion 2.x", {OPEN_CLIP: "OpenCLIP text encoder"}, 768, 0.18215)
SDXL = Layout(
    "Stable Diffusion XL",
    {XL_CLIP: "CLIP text encoder", XL_OPEN_CLIP: "OpenCLIP text encoder"},
    1024,
    0.13025,
)

# Prefixes of other kinds of files -> what the file is and what to do.
_REMEDY = "pass a Stable Diffusion checkpoint"
_WHOLE = "name the whole model too, by hub id or diffusers folder: FILE.safetensors@MODEL"
FOREIGN = {
    "control_model.": f"a ControlNet; {_REMEDY}",
    "conditioner.embedders.0.model.": f"SDXL's refiner; {_REMEDY}",
    "lora_": "a LoRA adapter; pass it as an adapter and its base model as the base",
    "down_blocks.": "a diffusers UNet alone; pass the folder that holds model_index.json",
} | {
    f"{start}{block}": f"{kind}; {_WHOLE}"
    for start in ("", UNET, "diffusion_model.")
    for block, kind in {
        "double_blocks.": "a Flux file",
        "joint_blocks.": "an SD3 file",
        "transformer_blocks.0.img_mod.": "a Qwen-Image file",
        "layers.0.attention.": "a Z-Image or Lumina file",
        "blocks.0.attn.wq.": "a Krea 2 file",
    }.items()
}

# Tensors that a pipeline does not need.
IDLE = re.compile(
    r"(first_stage_model\.)?model_ema\."  # running means of the weights
    r"|first_stage_model\.loss\."  # the autoencoder's critic
    r"|(betas|logvar|scale_factor|posterior_\w+|\w*alphas_cumprod\w*)$"  # SD1's noise schedule
    r"|(v_pred|ztsnr)$"  # empty tensors that mark v-prediction and zero terminal SNR
    r"|cond_stage_model\.(.+\.)?(position_ids|logit_scale|text_projection(\.weight)?)$"
    r"|conditioner\.embedders\.\d\.(.+\.)?(position_ids|logit_scale)$"
    r"|conditioner\.embedders\.0\.(.+\.)?text_projection(\.weight)?$"
)


@dataclass(frozen=True)
class Checkpoint:
    """The header of a `.safetensors` file."""

    path: Path
    shapes: dict[str, tuple[int, ...]]  # of the tensors, by name
    metadata: dict[str, str]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a matrix or convolution; raises BackboneError where the file has none."""
        if len(self.shapes.get(name, ())) < 2:
            raise BackboneError(
                f"{self.path} lacks the weight '{name}': it is not a whole Stable Diffusion "
                "checkpoint. Download it again, or pass another."
            )
        return self.shapes[name]

    def has(self, start: str) -> bool:
        """Whether any tensor's name starts with `start`."""
        return any(name.startswith(start) for name in self.shapes)

    def length(self, start: str) -> int:
        """Length of a numbered list such as "blocks.{}.", from 0 to the first missing number."""
        return sum(1 for _ in takewhile(self.has, (start.format(i) for i in count())))

    def read(self, start: str, dtype: torch.dtype) -> dict[str, Tensor]:
        """Tensors whose names start with `start`, as copies in `dtype`, without unneeded ones."""
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
        with reading(path, BackboneError), safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
            return Checkpoint(path, shapes, file.metadata() or {})
    except SafetensorError as error:
        raise BackboneError(
            f"{path} is not a safetensors file: {_diagnosis(path, error)}"
        ) from None


def _diagnosis(path: Path, error: SafetensorError) -> str:
    """What kind of file one that cannot be opened seems to be, and what to do."""
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


def layout_of(checkpoint: Checkpoint) -> Layout:
    """The family of a checkpoint, found by the names of its text encoders."""
    if checkpoint.has("conditioner.embedders."):
        return SDXL
    return SD2 if checkpoint.has(OPEN_CLIP) else SD1


def check_parts(checkpoint: Checkpoint) -> Layout:
    """The checkpoint's family; BackboneError unless it has all parts of it and nothing else."""
    for start, kind in FOREIGN.items():
        if checkpoint.has(start):
            raise BackboneError(f"{checkpoint.path}: this is {kind} (found '{start}…')")
    layout = layout_of(checkpoint)
    parts = layout.parts()
    absent = [f"{part} ({start}…)" for start, part in parts.items() if not checkpoint.has(start)]
    if absent:
        raise BackboneError(
            f"{checkpoint.path} has no {' and no '.join(absent)}: it is not a whole "
            f"{layout.title} checkpoint. Pass one with UNet, autoencoder and text encoder."
        )
    names = (name for name in checkpoint.shapes if not name.startswith(tuple(parts)))
    check_names(checkpoint.path, {"unexpected": [name for name in names if not IDLE.match(name)]})
    return layout


def check_names(path: Path, faults: Mapping[str, Collection[str]]) -> None:
    """Raise BackboneError where there are faulty tensors: their number by kind, and some names."""
    found = [
        f"{len(names)} {fault} ({', '.join(sorted(names)[:3])}{', …' if len(names) > 3 else ''})"
        for fault, names in faults.items()
        if names
    ]
    if found:
        raise BackboneError(
            f"the tensors of {path} are not those of Stable Diffusion: {'; '.join(found)}. "
            "Pass an unmodified checkpoint, or the model's diffusers folder."
        )


def load_weights(
    model: Model, part: dict[str, Tensor], weights: dict[str, Tensor], path: Path
) -> Model:
    """The model with `weights` loaded, in eval mode; BackboneError unless all names and shapes fit.

    `part` holds the same tensors under the file's names, to find those that were not converted.
    """
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    kept = {tensor.data_ptr() for tensor in weights.values()}  # converters drop unknown names
    dropped = {name for name, tensor in part.items() if tensor.data_ptr() not in kept}
    both = wanted.keys() & weights.keys()
    faults = {
        "missing": wanted.keys() - weights.keys(),
        "unexpected": (weights.keys() - wanted.keys()) | dropped,
        "of another shape": {name for name in both if weights[name].shape != wanted[name]},
    }
    check_names(path, faults)
    model.load_state_dict(weights, assign=True)
    return model.eval()
