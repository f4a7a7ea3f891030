"""The interface between the trainer and a method of learning a concept."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn

from rite_diffusion.backbones.protocols import Backbone, Conditioning
from rite_diffusion.config import TrainConfig
from rite_diffusion.types import LoraPair, ProductUpdate

NAME = "concept"  # under which trained weights and embeddings are attached to the backbone


class Method(ABC):
    """A method of learning a concept; its constructor adds trainable weights to the backbone.

    The rates of `config.optim` must be set. All state that a resumed run needs must be in the
    parameters of `groups`; anything else must be a function of them and of the step.
    """

    wants_masks = False  # whether it learns better with masks of the subject

    def __init__(self, backbone: Backbone, config: TrainConfig):
        self.backbone = backbone
        self.config = config
        backbone.triggers[NAME] = [concept.trigger for concept in config.concepts()]

    @abstractmethod
    def groups(self) -> list[dict]:
        """Torch parameter groups: `name`, `params` as (name, parameter) tuples, `lr`."""

    def schedule(self, step: int) -> tuple[int, int]:
        """First step and length of the learning-rate schedule at a step, counted from 0."""
        return 0, self.config.steps

    def begin(self, step: int) -> None:
        """Set `requires_grad` of the parameters that train in a step, counted from 0."""
        return

    @classmethod
    def text_is_frozen(cls, config: TrainConfig) -> bool:
        """Whether the conditioning of a caption never changes, so that it can be cached.

        It is then what the base's own `encode_captions` gives, and is encoded before the method is
        made.
        """
        return False

    @abstractmethod
    def conditioning(self, captions: list[str]) -> Conditioning:
        """Conditioning of a batch of captions, with gradients to trainable parameters."""

    def penalty(self, captions: list[str], masks: Tensor | None) -> Tensor | float:
        """A scalar to add to the loss of the batch that was just denoised.

        `masks` (B, 1, h, w) are the weights of the latent cells in [0, 1].
        """
        return 0.0

    @abstractmethod
    def pairs(self) -> list[LoraPair]:
        """The LoRA pairs of the adapter file; their tensors are those in training."""

    def products(self) -> list[ProductUpdate]:
        """The LoHa or LoKr updates of the adapter file; their tensors are those in training."""
        return []

    def embeddings(self) -> dict[str, Sequence[Tensor]]:
        """The learned embeddings of the adapter file: word -> tensors, one per text encoder."""
        return {}

    def remove(self) -> None:
        """Remove the method from the backbone; subclasses remove theirs and call this."""
        self.backbone.triggers.pop(NAME, None)

    def parameters(self) -> list[nn.Parameter]:
        """All trainable weights."""
        return [parameter for group in self.groups() for _, parameter in group["params"]]
