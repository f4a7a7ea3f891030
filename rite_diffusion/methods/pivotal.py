"""Pivotal tuning: a learned embedding and LoRA, one after the other or together.

Roich et al. 2021 invert a picture first and then tune the model around that pivot; here the pivot
is a learned embedding (Gal et al. 2022), and the tuning is LoRA. With `tokens.first` = 0 both train
together.
"""

from rite_diffusion.backbones.protocols import Backbone
from rite_diffusion.config import TrainConfig
from rite_diffusion.methods.embedding_method import EmbeddingMethod
from rite_diffusion.methods.new_embeddings import NewEmbeddings
from rite_diffusion.methods.weights import lora_weights
from rite_diffusion.types import LoraPair, ProductUpdate


class Pivotal(EmbeddingMethod):
    """Trains embeddings for `tokens.first` steps, then LoRA with fixed embeddings; or both."""

    def __init__(self, backbone: Backbone, config: TrainConfig):
        weights = lora_weights(backbone, config)
        super().__init__(backbone, config, weights, NewEmbeddings(backbone, config))

    def schedule(self, step: int) -> tuple[int, int]:
        """First step and length of a phase: each has a learning-rate schedule of its own."""
        first = self.config.tokens.first
        return (0, first) if step < first else (first, self.config.steps - first)

    def begin(self, step: int) -> None:
        """Train the embeddings, from step `tokens.first` on the pairs; with 0 both."""
        first = self.config.tokens.first
        for named in self._weights.named.values():
            for _, parameter in named:
                parameter.requires_grad_(step >= first)
        self._embeddings.train(step < first or not first)

    def pairs(self) -> list[LoraPair]:
        """The pairs in training; none while only the embeddings train."""
        pairs = super().pairs()
        return pairs if any(pair.up.any() for pair in pairs) else []

    def products(self) -> list[ProductUpdate]:
        """The LoHa or LoKr updates in training; none while only the embeddings train."""
        products = super().products()
        acting = any(all(part.any() for part in each.parts.values()) for each in products)
        return products if acting else []
