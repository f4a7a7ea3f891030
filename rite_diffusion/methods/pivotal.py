"""Pivotal tuning: embeddings of new words, and LoRA around them.

Roich et al. 2021 invert a picture first and then tune the model around that pivot; here the pivot
is a word (Gal et al. 2022) and the tuning LoRA. With `tokens.first` = 0 both train together.
"""

from rite_diffusion.backbones.protocols import Backbone
from rite_diffusion.config import TrainConfig
from rite_diffusion.methods.embedding_method import EmbeddingMethod
from rite_diffusion.methods.new_embeddings import NewEmbeddings
from rite_diffusion.methods.weights import lora_weights
from rite_diffusion.types import LoraPair


class Pivotal(EmbeddingMethod):
    """New words for `tokens.first` steps, then LoRA with the words held; or both together."""

    def __init__(self, backbone: Backbone, config: TrainConfig):
        weights = lora_weights(backbone, config)
        super().__init__(backbone, config, weights, NewEmbeddings(backbone, config))

    def schedule(self, step: int) -> tuple[int, int]:
        """Each of the two phases has its own course of rates."""
        first = self.config.tokens.first
        return (0, first) if step < first else (first, self.config.steps - first)

    def begin(self, step: int) -> None:
        """First the words alone, then the pairs alone; or both."""
        first = self.config.tokens.first
        for named in self._weights.named.values():
            for _, parameter in named:
                parameter.requires_grad_(step >= first)
        self._words.train(step < first or not first)

    def pairs(self) -> list[LoraPair]:
        """The pairs in training; none while the words train alone."""
        pairs = super().pairs()
        return pairs if any(pair.up.any() for pair in pairs) else []
