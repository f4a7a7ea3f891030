"""What the methods share that learn words."""

from collections.abc import Sequence

from torch import Tensor

from rite_diffusion.adapters.learned_embeddings import remove_embeddings
from rite_diffusion.backbones.protocols import Backbone, Conditioning
from rite_diffusion.config import TrainConfig
from rite_diffusion.methods.method import NAME, Method
from rite_diffusion.methods.new_embeddings import NewEmbeddings
from rite_diffusion.methods.weights import Weights, parameter_groups
from rite_diffusion.types import LoraPair


class EmbeddingMethod(Method):
    """New words, and weights around them."""

    def __init__(
        self,
        backbone: Backbone,
        config: TrainConfig,
        weights: Weights,
        new_placeholders: NewEmbeddings,
    ):
        super().__init__(backbone, config)
        self._weights = weights
        self._words = new_placeholders

    def groups(self) -> list[dict]:
        """The weights by component, and the words."""
        pairs = parameter_groups(self.backbone, self._weights.named, self.config.optim)
        return [*pairs, self._words.group()]

    def begin(self, step: int) -> None:
        """All train, but for words that have grown."""
        self._words.train(True)

    def conditioning(self, captions: list[str]) -> Conditioning:
        """The text encoder's states of the captions, with the words as they are now."""
        return self.backbone.encode_captions(captions)

    def pairs(self) -> list[LoraPair]:
        """The pairs in training."""
        return self._weights.pairs()

    def embeddings(self) -> dict[str, Sequence[Tensor]]:
        """The learned words."""
        return self._words.content()

    def remove(self) -> None:
        """Take weights and words out."""
        self._weights.remove()
        remove_embeddings(self.backbone, NAME)
        super().remove()
