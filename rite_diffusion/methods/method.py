"""What a method of learning tells the trainer, which knows none of them by name."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn

from rite_diffusion.backbones.protocols import Backbone, Conditioning
from rite_diffusion.config import TrainConfig
from rite_diffusion.types import LoraPair

NAME = "concept"  # of what is in training, within the backbone


class Method(ABC):
    """One way to learn a concept: made on a backbone, it has put its trainable weights in.

    The rates of `config.optim` must be set. All that a continued run needs lies in the parameters
    that `groups` names: whatever else a method does is a function of them and of the step.
    """

    wants_masks = False  # whether it teaches less without masks of the subject

    def __init__(self, backbone: Backbone, config: TrainConfig):
        self.backbone = backbone
        self.config = config
        backbone.triggers[NAME] = [concept.trigger for concept in config.concepts()]

    @abstractmethod
    def groups(self) -> list[dict]:
        """Torch parameter groups: `name`, `params` as (name, parameter) tuples, `lr`."""

    def schedule(self, step: int) -> tuple[int, int]:
        """First step and length of the course of rates that a step, counted from 0, is part of."""
        return 0, self.config.steps

    def begin(self, step: int) -> None:
        """Set `requires_grad` of the parameters that train in a step, counted from 0."""
        return

    @property
    def text_is_frozen(self) -> bool:
        """Whether the conditioning of a caption never changes, so that it can be kept on disk."""
        return False

    @abstractmethod
    def conditioning(self, captions: list[str]) -> Conditioning:
        """Conditioning of a batch of captions, with gradients to what trains."""

    def penalty(self, captions: list[str], masks: Tensor | None) -> Tensor | float:
        """What the method adds to the loss of the batch that was just denoised.

        `masks` (B, 1, h, w) are the weights of the latent cells.
        """
        return 0.0

    @abstractmethod
    def pairs(self) -> list[LoraPair]:
        """The live LoRA pairs that go into the adapter file."""

    def embeddings(self) -> dict[str, Sequence[Tensor]]:
        """The learned words that go into the adapter file, with vectors for each text encoder."""
        return {}

    def remove(self) -> None:
        """Take everything out of the backbone again; a subclass goes on with its own."""
        self.backbone.triggers.pop(NAME, None)

    def parameters(self) -> list[nn.Parameter]:
        """All trainable weights."""
        return [parameter for group in self.groups() for _, parameter in group["params"]]
