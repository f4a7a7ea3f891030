"""The base class of methods with learned embeddings."""

from collections.abc import Sequence

from torch import Tensor

from rite_diffusion.adapters.learned_embeddings import remove_embeddings
from rite_diffusion.backbones.protocols import Backbone, Conditioning
from rite_diffusion.config import TrainConfig
from rite_diffusion.methods.method import NAME, Method
from rite_diffusion.methods.new_embeddings import NewEmbeddings
from rite_diffusion.methods.weights import Weights, parameter_groups
from rite_diffusion.types import LoraPair, ProductUpdate


class EmbeddingMethod(Method):
    """Learned embeddings for new words, and other weights."""

    def __init__(
        self,
        backbone: Backbone,
        config: TrainConfig,
        weights: Weights,
        embeddings: NewEmbeddings,
    ):
        super().__init__(backbone, config)
        self._weights = weights
        self._embeddings = embeddings

    def groups(self) -> list[dict]:
        """A group for each component's weights and one for the learned embeddings."""
        pairs = parameter_groups(self.backbone, self._weights.named, self.config.optim)
        return [*pairs, self._embeddings.group()]

    def begin(self, step: int) -> None:
        """Train everything, except embeddings that have reached `tokens.stop_norm`."""
        self._embeddings.train(True)

    def conditioning(self, captions: list[str]) -> Conditioning:
        """The text encoder's states of the captions, with the embeddings' current values."""
        return self.backbone.encode_captions(captions)

    def pairs(self) -> list[LoraPair]:
        """The LoRA pairs in training."""
        return self._weights.pairs()

    def products(self) -> list[ProductUpdate]:
        """The LoHa or LoKr updates in training."""
        return self._weights.products()

    def embeddings(self) -> dict[str, Sequence[Tensor]]:
        """The learned embeddings by word."""
        return self._embeddings.content()

    def remove(self) -> None:
        """Remove weights and learned embeddings."""
        self._weights.remove()
        remove_embeddings(self.backbone, NAME)
        super().remove()
