"""LoRA (Hu et al. 2021) on the attention of denoiser and text encoder, or on more layers."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

from rite_diffusion._version import __version__
from rite_diffusion.adapters import Adapter, AdapterInfo, save_adapter
from rite_diffusion.adapters.adapter import base_name
from rite_diffusion.backbones.conditioning import KeptConditioning, joined, rows
from rite_diffusion.backbones.protocols import Backbone, Conditioning
from rite_diffusion.backbones.text_cache import cached_conditioning, caption_folder
from rite_diffusion.config import LoraSection, TrainConfig
from rite_diffusion.files.writing import user_path
from rite_diffusion.methods.init import follow_gradient
from rite_diffusion.methods.method import NAME, Method
from rite_diffusion.methods.start import set_start
from rite_diffusion.methods.weights import (
    adapted_paths,
    lora_weights,
    new_weights,
    parameter_groups,
)
from rite_diffusion.types import LoraPair, ProductUpdate

BYTES_KEPT = 2**28  # of captions' states in memory if the text encoder does not train


class PlainLora(Method):
    """LoRA pairs on the layers of `lora.layers`; each component has its own learning rate."""

    def __init__(self, backbone: Backbone, config: TrainConfig):
        super().__init__(backbone, config)
        self._weights = lora_weights(backbone, config)
        set_start(self._weights.pairs(), config.lora)
        encode = partial(cached_conditioning, backbone, folder=caption_folder(config.cache))
        self._frozen_states = KeptConditioning(encode, BYTES_KEPT, backbone.device)

    def groups(self) -> list[dict]:
        """A group for the UNet's pairs and one for each text encoder's."""
        return parameter_groups(self.backbone, self._weights.named, self.config.optim)

    @classmethod
    def text_is_frozen(cls, config: TrainConfig) -> bool:
        """Whether no text encoder is adapted."""
        return not config.lora.text_encoder

    def conditioning(self, captions: list[str]) -> Conditioning:
        """The text encoder's states of the captions; equal captions are encoded once.

        If the text encoder does not train, states are cached.
        """
        distinct = list(dict.fromkeys(captions))
        if self.text_is_frozen(self.config):
            encoded = joined([self._frozen_states(text) for text in distinct])
        else:
            encoded = self.backbone.encode_captions(distinct)
        return rows(encoded, [distinct.index(text) for text in captions])

    def pairs(self) -> list[LoraPair]:
        """The pairs in training."""
        return self._weights.pairs()

    def products(self) -> list[ProductUpdate]:
        """The LoHa or LoKr updates in training."""
        return self._weights.products()

    def remove(self) -> None:
        """Remove the LoRA layers."""
        self._weights.remove()
        super().remove()


class Lora:
    """LoRA pairs injected into a backbone (Hu et al. 2021), for a training loop of one's own.

    `layers` is "attention", or "blocks" for all layers of the denoiser's blocks; `text_encoder`
    adapts the text encoders' attention too. scale = alpha / rank, of rslora alpha / √rank; `alpha`
    defaults to what makes it 1. dora trains the magnitudes of the adapted weights too. `down` is
    drawn by `seed` and `up` is zero, so that new pairs change nothing; with `init` = "pissa" they
    are the weights' leading directions, subtracted beside the base, and `pairs` have twice the
    rank. Of the kinds "loha" and "lokr", whose `factor` and `full_matrix` are as in the settings,
    `products` has the updates.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        rank: int = 8,
        alpha: float | None = None,
        kind: Literal["lora", "rslora", "dora", "loha", "lokr"] = "lora",
        layers: Literal["attention", "blocks"] = "attention",
        text_encoder: bool = True,
        init: Literal["gaussian", "pissa"] = "gaussian",
        factor: int = 8,
        full_matrix: bool = False,
        seed: int = 0,
    ):
        self.backbone = backbone
        paths = adapted_paths(backbone, layers, text_encoder)
        lora = LoraSection(
            rank=rank, alpha=alpha, kind=kind, init=init, factor=factor, full_matrix=full_matrix
        )
        self._weights = new_weights(backbone, paths, lora, seed)

    def follow_gradient(self, backward: Callable[[], object], size: float) -> None:
        """Start new pairs along the leading directions of a loss's first gradient (LoRA-One).

        `backward` computes the loss and calls its `backward`. `size` is the spectral norm of every
        layer's update.
        """
        follow_gradient(self.backbone, NAME, backward, size)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """A torch parameter group for each component: `name`, and `params` as (name, parameter)."""
        return [{"name": name, "params": list(own)} for name, own in self._weights.named.items()]

    def pairs(self) -> list[LoraPair]:
        """The pairs; their tensors are the parameters in training, except after PiSSA's start."""
        return self._weights.pairs()

    def products(self) -> list[ProductUpdate]:
        """The LoHa or LoKr updates; their tensors are the parameters in training."""
        return self._weights.products()

    def save(self, path: str | Path, *, trigger: str, class_noun: str = "") -> Path:
        """Write the pairs as an adapter file, `.safetensors`, and return its path.

        Raises RiteError where it cannot be written.
        """
        target = user_path(path)
        info = AdapterInfo(
            trigger=trigger,
            class_noun=class_noun,
            base=base_name(self.backbone.name),
            base_fingerprint=self.backbone.fingerprint,
            family=self.backbone.family,
            method="lora",
            version=__version__,
        )
        save_adapter(target, Adapter(self.pairs(), info, products=self.products()))
        return target

    def remove(self) -> None:
        """Remove the pairs from the backbone."""
        self._weights.remove()
