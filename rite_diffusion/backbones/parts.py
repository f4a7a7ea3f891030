"""A pipeline's models, each loaded when it is used, which can leave memory and come back."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from rite_diffusion.backbones.memory import stored_tensors

LARGE = 2**32  # bytes; the digest of a larger text encoder samples each weight
SAMPLE = 2**16  # values in such a sample


class PartSource(Protocol):
    """Where the weights of a pipeline's parts come from."""

    def load(self, name: str) -> Any:
        """A part with its weights in main memory; BackboneError where it cannot be read."""
        ...

    def weights(self, name: str, paths: Sequence[str]) -> list[Tensor] | None:
        """The weights of a part's layers at these paths, None where they cannot be read alone."""
        ...


def is_empty(part: Any) -> bool:
    """Whether a part has no weights: they are on "meta"."""
    return part.device.type == "meta"


class Parts:
    """A pipeline's denoiser, autoencoder and text encoders by name, frozen, on one device.

    A part whose weights are on "meta" is loaded from `source` when it is used. `place(name, part)`
    puts a part that is used on the device.
    """

    def __init__(
        self,
        pipeline: Any,
        names: Sequence[str],
        denoiser: str,
        device: torch.device,
        source: PartSource,
        place: Callable[[str, Any], None],
    ):
        self.pipeline = pipeline
        self.names = [name for name in names if getattr(pipeline, name) is not None]
        self.text_names = [name for name in self.names if name not in ("vae", denoiser)]
        self.device = device
        self.released = set[str]()
        self.source, self._place = source, place
        self._placed = set[str]()
        for name in self.names:
            _freeze(name, self.as_it_is(name))

    def as_it_is(self, name: str) -> Any:
        """A part on its current device; on "meta" it has no weights."""
        return getattr(self.pipeline, name)

    def __getitem__(self, name: str) -> Any:
        """A part on the device, loaded where it has no weights."""
        if is_empty(self.as_it_is(name)):
            part = self.source.load(name)
            _freeze(name, part)
            setattr(self.pipeline, name, part)
        if name not in self._placed:
            self._place(name, self.as_it_is(name))
            self._placed.add(name)
        return self.as_it_is(name)

    def weights(self, name: str, paths: Sequence[str]) -> list[Tensor]:
        """The weights of a part's layers; of a part that is not loaded these alone are read."""
        found = self.source.weights(name, paths) if is_empty(self.as_it_is(name)) else None
        if found is None:
            if is_empty(self.as_it_is(name)):
                self[name]
            found = [self.as_it_is(name).get_submodule(path).weight for path in paths]
        return found

    def release(self, names: Sequence[str]) -> None:
        """Move parts from the device to main memory; where that is the device, out of memory."""
        if self.device.type == "cpu":
            self.unload(names)
            return
        self._leave(names, "cpu")

    def unload(self, names: Sequence[str]) -> None:
        """Drop the weights of parts, which are read again from the base's files when used."""
        self._leave(names, "meta")

    def _leave(self, names: Sequence[str], place: str) -> None:
        self.released |= set(names)
        self._placed -= set(names)
        for name in names:
            if not is_empty(self.as_it_is(name)):
                self.as_it_is(name).to(place)

    def recall(self) -> None:
        """Mark no part as released; each is loaded again when it is used."""
        self.released.clear()


def _freeze(name: str, part: Any) -> None:
    """Set a part to frozen and evaluating, and SDXL's autoencoder to fp32, as fp16 overflows."""
    part.requires_grad_(False).eval()
    is_half = name == "vae" and part.dtype == torch.float16
    if is_half and part.config.get("force_upcast"):
        part.float()


def text_digest(parts: Parts) -> str:
    """First 16 hex digits of a SHA-256 over the text encoders and their tokenizers.

    For an encoder larger than 4 GiB it covers 65,536 values of each weight.
    """
    digest = hashlib.sha256()
    for name in parts.text_names:
        encoder = parts[name]
        tokenizer = parts.as_it_is(name.replace("text_encoder", "tokenizer"))
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
