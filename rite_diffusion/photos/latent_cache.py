"""Latents on disk, so that the same pictures are not encoded again for the next run.

An entry's name is the digest of the pixels that the encoder sees, its folder's that of the encoder:
an edited photo, another cut or another model is another entry, and none is ever stale.
"""

from hashlib import sha256
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from rite_diffusion.files import write_atomically
from rite_diffusion.types import Backbone


def cached_latents(backbone: Backbone, pixels: Tensor, folder: Path | None) -> Tensor:
    """Latents (B, C, h, w) fp32 of pictures (B, 3, H, W) in [-1, 1], from the cache if it has them.

    An entry that cannot be read is made again.
    """
    if folder is None:
        return backbone.encode_images(pixels).float().cpu()
    digest = sha256(str(tuple(pixels.shape)).encode() + pixels.numpy().tobytes()).hexdigest()
    path = folder / f"{digest}.safetensors"
    known = _read(path)
    if known is not None:
        return known
    latents = backbone.encode_images(pixels).float().cpu().contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, save({"latents": latents}))
    return latents


def _read(path: Path) -> Tensor | None:
    """The latents of an entry; None where there is none, or a damaged one."""
    try:
        latents = load(path.read_bytes())["latents"]
    except (OSError, SafetensorError, KeyError):
        return None
    return latents if bool(torch.isfinite(latents).all()) else None
