"""What backbones made of diffusers pipelines share, whatever their family."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import nn

from rite_diffusion.backbones.fingerprint import fingerprint
from rite_diffusion.backbones.memory import offload_layers, offload_models
from rite_diffusion.backbones.parts import Parts, PartSource, autoencoder_digest, text_digest
from rite_diffusion.backbones.protocols import Defaults, JointAttention, LearnedEmbedding
from rite_diffusion.config import MemorySection


class PipelineBackbone:
    """A pipeline's frozen denoiser and encoders, each loaded and on the device once it is used.

    `source` has the weights of parts that the pipeline holds without them.
    """

    denoiser_name: ClassVar[str]
    encoder_names: ClassVar[tuple[str, ...]] = ("vae", "text_encoder")
    own_defaults: ClassVar[Defaults] = Defaults()
    ends: ClassVar[tuple[str, ...]]  # paths of the layers that the fingerprint reads
    joint_attention: JointAttention | None = None

    def __init__(
        self,
        pipeline: Any,
        name: str,
        device: torch.device,
        attention: str,
        source: PartSource,
        defaults: Defaults | None = None,
        memory: MemorySection | None = None,
    ):
        self.name = name
        self.device = device
        self.memory = memory or MemorySection()
        self.attention = attention
        self.defaults = defaults or self.own_defaults
        names = [*self.encoder_names, self.denoiser_name]
        self.parts = Parts(pipeline, names, self.denoiser_name, device, source, self._place)
        self.dtype: torch.dtype = self.parts.as_it_is(self.denoiser_name).dtype
        self.fingerprint = fingerprint(self.parts.weights(self.denoiser_name, self.ends))
        if self.memory.offload == "model":
            models = {each: self.parts[each] for each in self.parts.names}
            denoiser = models.pop(self.denoiser_name)
            offload_models([denoiser, *models.values()], device)
        self.embeddings: dict[str, LearnedEmbedding] = {}
        self.triggers: dict[str, Sequence[str]] = {}

    def _place(self, name: str, part: Any) -> None:
        """Put a part that is used on the device, unless `memory.offload` says otherwise."""
        self.prepare(name, part)
        if self.attention == "xformers" and name in ("vae", self.denoiser_name):
            part.enable_xformers_memory_efficient_attention()
        if self.memory.offload == "layers" and name == self.denoiser_name:
            offload_layers(part, self.device)
        elif self.memory.offload != "model":
            part.to(self.device)

    def prepare(self, name: str, part: Any) -> None:
        """Change a part for this family, once it is loaded."""
        return

    def load(self) -> None:
        """Load all parts, so that none is missing later."""
        for name in self.parts.names:
            self.parts[name]

    @property
    def denoiser(self) -> Any:
        """The network that predicts, loaded where it was not used before."""
        return self.parts[self.denoiser_name]

    @property
    def denoiser_config(self) -> Any:
        """The configuration of the denoiser, which needs no weights."""
        return self.parts.as_it_is(self.denoiser_name).config

    @property
    def architecture(self) -> dict[str, nn.Module]:
        """The modules of `components`, without weights where they are not loaded."""
        return {name: self.parts.as_it_is(name) for name in self.component_names}

    @property
    def component_names(self) -> list[str]:
        """The names of `components`."""
        return [self.denoiser_name]

    @property
    def vae(self) -> Any:
        """The autoencoder between pictures and latents."""
        return self.parts["vae"]

    @property
    def pixels_per_latent(self) -> int:
        """Pixels along one side of a latent cell."""
        return 2 ** (len(self.parts.as_it_is("vae").config.block_out_channels) - 1)

    def encoder_fingerprint(self) -> str:
        """First 16 hex digits of a SHA-256 over the autoencoder's encoder, and its dtype."""
        return self._picture_digest

    @cached_property
    def _picture_digest(self) -> str:
        return autoencoder_digest(self.vae)

    @cached_property
    def _text_digest(self) -> str:
        return text_digest(self.parts)

    @property
    def protected_words(self) -> list[str]:
        """Words that prompts take literally: learned embeddings and adapters' triggers."""
        called = [word for words in self.triggers.values() for word in words]
        return list(dict.fromkeys([*self.embeddings, *called]))

    def checkpoint_gradients(self, wanted: bool) -> None:
        """Turn gradient checkpointing of the denoiser on or off."""
        if wanted:
            self.denoiser.enable_gradient_checkpointing()
        else:
            self.denoiser.disable_gradient_checkpointing()

    @property
    def text_encoders(self) -> list[str]:
        """The names of the text encoders."""
        return self.parts.text_names

    def release(self, names: Sequence[str]) -> None:
        """Move parts from the device to main memory, or on a CPU out of memory.

        They come back when something is encoded or decoded.
        """
        self.parts.release(names)

    def unload(self, names: Sequence[str]) -> None:
        """Drop parts from all memory; they are read from the base's files when they are used.

        With `memory.offload = model`, whose hooks must stay, they move to main memory instead.
        """
        if self.memory.offload == "model":
            self.parts.release(names)
        else:
            self.parts.unload(names)

    def recall(self) -> None:
        """Load released parts again as soon as `components` is used."""
        self.parts.recall()
