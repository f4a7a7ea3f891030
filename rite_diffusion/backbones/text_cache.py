"""What a text encoder that is not trained says of prompts, on disk.

An entry's name is the digest of the prompt, its folder's that of the encoders: an edited caption or
another model is another entry, and none is ever stale.
"""

from hashlib import sha256
from pathlib import Path

from torch import Tensor

from rite_diffusion.backbones.protocols import Backbone, Conditioning
from rite_diffusion.files.cache import cached_tensors


def cached_conditioning(backbone: Backbone, prompt: str, folder: Path | None) -> Conditioning:
    """The conditioning (1, …) of a prompt, from the cache if it has it.

    Encoded alone, so that it does not depend on which prompts come with it. An entry that cannot be
    read is made again.
    """
    if folder is None:
        return backbone.encode_captions([prompt])

    def encode() -> dict[str, Tensor]:
        found = backbone.encode_captions([prompt])
        return {"states": found.states, **found.extra}

    name = sha256(prompt.encode()).hexdigest()
    path = folder / backbone.text_fingerprint / f"{name}.safetensors"
    tensors = {
        key: value.to(backbone.device)
        for key, value in cached_tensors(path, "states", encode).items()
    }
    return Conditioning(tensors.pop("states"), tensors)
