"""Plain LoRA (Hu et al. 2021) on the attention of UNet and text encoder, or on more layers."""

from functools import lru_cache, partial

import torch

from rite_diffusion.backbones.protocols import Backbone, Conditioning
from rite_diffusion.backbones.text_cache import cached_conditioning
from rite_diffusion.config import TrainConfig
from rite_diffusion.files.writing import cache_folder
from rite_diffusion.methods.method import Method
from rite_diffusion.methods.weights import LoraWeights, adapted_paths
from rite_diffusion.types import LoraPair

CAPTIONS_KEPT = 256  # states that stay in memory where the text encoder does not train


class PlainLora(Method):
    """Pairs on the layers that `lora.layers` names; each component has its own learning rate."""

    def __init__(self, backbone: Backbone, config: TrainConfig):
        super().__init__(backbone, config)
        self._weights = LoraWeights(backbone, config, adapted_paths(backbone, config))
        folder = cache_folder() / "captions" if config.cache else None
        encode = partial(cached_conditioning, backbone, folder=folder)
        self._frozen_states = lru_cache(CAPTIONS_KEPT)(encode)

    def groups(self) -> list[dict]:
        """A group for the UNet's pairs and one for each text encoder's."""
        return self._weights.groups()

    @property
    def text_is_frozen(self) -> bool:
        """Whether no text encoder is adapted."""
        return not self.config.lora.text_encoder

    def conditioning(self, captions: list[str]) -> Conditioning:
        """The text encoder's states of the captions, of equal ones encoded once.

        Where the text encoder does not train, the states of past captions are kept.
        """
        distinct = list(dict.fromkeys(captions))
        if self.text_is_frozen:
            encoded = _joined([self._frozen_states(text) for text in distinct])
        else:
            encoded = self.backbone.encode_prompts(distinct)
        return encoded.rows([distinct.index(text) for text in captions])

    def pairs(self) -> list[LoraPair]:
        """The pairs in training."""
        return self._weights.pairs()

    def remove(self) -> None:
        """Take the LoRA layers out."""
        self._weights.remove()


def _joined(parts: list[Conditioning]) -> Conditioning:
    """The conditioning of all the parts' prompts, in order."""
    extra = {name: torch.cat([part.extra[name] for part in parts]) for name in parts[0].extra}
    return Conditioning(torch.cat([part.states for part in parts]), extra)
