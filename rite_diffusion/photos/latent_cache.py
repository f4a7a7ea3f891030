"""Latents on disk, so that the same pictures are not encoded again for the next run.

An entry's name is the digest of the pixels that the encoder sees, its folder's that of the encoder:
an edited photo, another cut or another model is another entry, and none is ever stale.
"""

from hashlib import sha256
from pathlib import Path

from torch import Tensor

from rite_diffusion.backbones.protocols import Backbone
from rite_diffusion.files.cache import cached_tensors


def cached_latents(backbone: Backbone, pixels: Tensor, folder: Path | None) -> Tensor:
    """Latents (B, C, h, w) fp32 of pictures (B, 3, H, W) in [-1, 1], from the cache if it has them.

    An entry that cannot be read is made again.
    """

    def encode() -> dict[str, Tensor]:
        return {"latents": backbone.encode_images(pixels).float().cpu()}

    if folder is None:
        return encode()["latents"]
    digest = sha256(str(tuple(pixels.shape)).encode() + pixels.numpy().tobytes()).hexdigest()
    return cached_tensors(folder / f"{digest}.safetensors", "latents", encode)["latents"]
