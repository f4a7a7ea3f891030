"""A cache of latents on disk, so that pictures are encoded once for all runs.

An entry is named by the digest of the pixels that are encoded, its folder by that of the encoder.
An edited photo, another crop or another model has another entry, so entries are never out of date.
"""

from hashlib import sha256
from pathlib import Path

from torch import Tensor

from rite_diffusion.backbones.protocols import Backbone
from rite_diffusion.files.cache import cached_tensors


def cached_latents(backbone: Backbone, pixels: Tensor, folder: Path | None) -> Tensor:
    """Latents (B, C, h, w) fp32 of pictures (B, 3, H, W) in [-1, 1], from the cache if there.

    An entry that cannot be read is replaced.
    """

    def encode() -> dict[str, Tensor]:
        return {"latents": backbone.encode_images(pixels).float().cpu()}

    if folder is None:
        return encode()["latents"]
    digest = sha256(str(tuple(pixels.shape)).encode() + pixels.numpy().tobytes()).hexdigest()
    return cached_tensors(folder / f"{digest}.safetensors", "latents", encode)["latents"]
