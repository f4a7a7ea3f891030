"""A cache on disk of captions' conditioning, for text encoders that are not trained.

An entry is named by the caption's digest, its folder by that of the text encoders, so an edited
caption or another model is another entry.
"""

from hashlib import sha256
from pathlib import Path

from torch import Tensor

from rite_diffusion.backbones.protocols import Backbone, Conditioning
from rite_diffusion.files.cache import cached_tensors
from rite_diffusion.files.writing import cache_folder


def caption_folder(is_kept: bool) -> Path | None:
    """The folder of captions' conditioning in the cache, None where nothing is kept on disk."""
    return cache_folder() / "captions" if is_kept else None


def cached_conditioning(backbone: Backbone, prompt: str, folder: Path | None) -> Conditioning:
    """The conditioning (1, …) of a caption, in main memory from the cache in `folder`.

    The caption is encoded alone, so the result does not depend on the rest of a batch. An entry
    that cannot be read is replaced. RunError where the cache cannot be written.
    """
    if folder is None:
        return backbone.encode_captions([prompt])

    def encode() -> dict[str, Tensor]:
        found = backbone.encode_captions([prompt])
        return {"states": found.states, **found.extra}

    name = sha256(prompt.encode()).hexdigest()
    path = folder / backbone.text_fingerprint / f"{name}.safetensors"
    tensors = dict(cached_tensors(path, "states", encode))
    return Conditioning(tensors.pop("states"), tensors)
