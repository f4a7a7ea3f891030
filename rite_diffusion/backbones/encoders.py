"""A pipeline's encoders, which can be released from memory and loaded again when used."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from rite_diffusion.backbones.memory import stored_tensors

LARGE = 2**32  # bytes; the digest of a larger text encoder samples each weight
SAMPLE = 2**16  # values in such a sample


class Encoders:
    """A pipeline's autoencoder and text encoders by name, frozen, on one device.

    Without a device, hooks of their own move them. `reopen` loads the pipeline again, for encoders
    that were released on a CPU and are needed.
    """

    def __init__(
        self,
        pipeline: Any,
        names: Sequence[str],
        device: torch.device | None,
        reopen: Callable[[], Any],
    ):
        self.pipeline = pipeline
        self.names = [name for name in names if getattr(pipeline, name) is not None]
        self.device = device
        self.released = set[str]()
        self._reopen = reopen
        for name in self.names:
            self._prepare(pipeline, name)

    def _prepare(self, pipeline: Any, name: str) -> None:
        encoder = getattr(pipeline, name).requires_grad_(False).eval()
        if self.device is not None:
            encoder.to(self.device)
        is_half = name == "vae" and encoder.dtype == torch.float16
        if is_half and encoder.config.get("force_upcast"):
            encoder.float()  # SDXL's autoencoder overflows in half precision

    def as_it_is(self, name: str) -> Any:
        """An encoder on its current device; on "meta" it has no weights."""
        return getattr(self.pipeline, name)

    def __getitem__(self, name: str) -> Any:
        """An encoder on the device, loaded again where it was released."""
        if self.as_it_is(name).device.type == "meta":
            fresh = self._reopen()
            for each in self.names:
                if self.as_it_is(each).device.type == "meta":
                    self._prepare(fresh, each)
                    setattr(self.pipeline, each, getattr(fresh, each))
        elif self.device is not None and self.as_it_is(name).device.type != self.device.type:
            self.as_it_is(name).to(self.device)
        return self.as_it_is(name)

    @property
    def text_names(self) -> list[str]:
        """The names of the text encoders."""
        return [name for name in self.names if name != "vae"]

    def release(self, names: Sequence[str]) -> None:
        """Move encoders from the device to the CPU's memory, or on a CPU out of memory."""
        place = "meta" if self.device is not None and self.device.type == "cpu" else "cpu"
        self.released |= set(names)
        for name in names:
            if self.as_it_is(name).device.type != "meta":
                self.as_it_is(name).to(place)

    def recall(self) -> None:
        """Mark no encoder as released; each is loaded again when it is used."""
        self.released.clear()


def text_digest(encoders: Encoders) -> str:
    """First 16 hex digits of a SHA-256 over the text encoders and their tokenizers.

    For an encoder larger than 4 GiB it covers 65,536 values of each weight.
    """
    digest = hashlib.sha256()
    for name in encoders.text_names:
        encoder = encoders[name]
        tokenizer = encoders.as_it_is(name.replace("text_encoder", "tokenizer"))
        described = [encoder.config.to_json_string(), tokenizer.special_tokens_map]
        digest.update(f"{described} {sorted(tokenizer.get_vocab().items())}".encode())
        weights = [part for each in encoder.state_dict().values() for part in stored_tensors(each)]
        is_large = sum(weight.nbytes for weight in weights) > LARGE
        for weight in weights:
            flat = weight.flatten()
            if is_large:
                flat = flat[:: max(1, len(flat) // SAMPLE)]
            digest.update(flat.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def autoencoder_digest(vae: Any) -> str:
    """First 16 hex digits of a SHA-256 over an autoencoder's encoder, and its dtype."""
    digest = hashlib.sha256(str(vae.config.get("scaling_factor")).encode())
    for name, weight in vae.state_dict().items():
        if not name.startswith(("decoder.", "post_quant_conv.")):
            digest.update(weight.detach().cpu().float().numpy().tobytes())
    return f"{digest.hexdigest()[:16]}-{vae.dtype}".replace("torch.", "")
