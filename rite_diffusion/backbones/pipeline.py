"""What backbones made of diffusers pipelines share, whatever their family."""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch

from rite_diffusion.backbones.encoders import Encoders, autoencoder_digest, text_digest
from rite_diffusion.backbones.memory import offload_layers, offload_models
from rite_diffusion.backbones.protocols import Defaults, JointAttention, LearnedEmbedding
from rite_diffusion.config import MemorySection


class PipelineBackbone:
    """A pipeline's frozen denoiser on a device, and its encoders, which leave memory and come back.

    `reopen` loads the pipeline again, for encoders that were released and are needed again.
    """

    denoiser_name: ClassVar[str]
    encoder_names: ClassVar[tuple[str, ...]] = ("vae", "text_encoder")
    own_defaults: ClassVar[Defaults] = Defaults()
    ends: ClassVar[tuple[str, ...]] = ()  # paths of linear layers that the fingerprint reads
    joint_attention: JointAttention | None = None

    def __init__(
        self,
        pipeline: Any,
        name: str,
        device: torch.device,
        attention: str,
        reopen: Callable[[], Any],
        defaults: Defaults | None = None,
        memory: MemorySection | None = None,
    ):
        self.name = name
        self.device = device
        self.memory = memory or MemorySection()
        self.attention = attention
        self.defaults = defaults or self.own_defaults
        self.denoiser: Any = getattr(pipeline, self.denoiser_name)
        self.denoiser.requires_grad_(False).eval()
        self.dtype: torch.dtype = self.denoiser.dtype
        by_hooks = self.memory.offload == "model"
        place = None if by_hooks else device
        self.encoders = Encoders(pipeline, self.encoder_names, place, reopen)
        if by_hooks:
            models = [self.encoders.as_it_is(name) for name in self.encoders.names]
            offload_models([self.denoiser, *models], device)
        elif self.memory.offload == "layers":
            offload_layers(self.denoiser, device)
        else:
            self.denoiser.to(device)
        self.embeddings: dict[str, LearnedEmbedding] = {}
        self.triggers: dict[str, Sequence[str]] = {}

    @property
    def vae(self) -> Any:
        """The autoencoder between pictures and latents."""
        return self.encoders["vae"]

    @property
    def pixels_per_latent(self) -> int:
        """Pixels along one side of a latent cell."""
        return 2 ** (len(self.encoders.as_it_is("vae").config.block_out_channels) - 1)

    def encoder_fingerprint(self) -> str:
        """First 16 hex digits of a SHA-256 over the autoencoder's encoder, and its dtype."""
        return autoencoder_digest(self.vae)

    @cached_property
    def _text_digest(self) -> str:
        return text_digest(self.encoders)

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

    def release(self, names: Sequence[str]) -> None:
        """Move encoders from the device to the CPU's memory, or on a CPU out of memory.

        They are loaded again when something is encoded or decoded.
        """
        self.encoders.release(names)

    def recall(self) -> None:
        """Load released encoders again as soon as `components` is used."""
        self.encoders.recall()
