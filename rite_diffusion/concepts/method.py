"""What a method of learning tells the trainer, which knows none of them by name."""

from abc import ABC, abstractmethod

from torch import nn

from rite_diffusion.config import TrainConfig
from rite_diffusion.types import Backbone, Conditioning, LoraPair


class Method(ABC):
    """One way to learn a concept: made on a backbone, it has put its trainable weights in.

    The rates of `config.optim` must be set.
    """

    def __init__(self, backbone: Backbone, config: TrainConfig):
        self.backbone = backbone
        self.config = config

    @abstractmethod
    def groups(self) -> list[dict]:
        """Torch parameter groups: `name`, `params` as (name, parameter) tuples, `lr`."""

    @property
    def text_is_frozen(self) -> bool:
        """Whether the conditioning of a caption never changes, so that it can be kept on disk."""
        return False

    @abstractmethod
    def conditioning(self, captions: list[str]) -> Conditioning:
        """Conditioning of a batch of captions, with gradients to what trains."""

    @abstractmethod
    def pairs(self) -> list[LoraPair]:
        """The live LoRA pairs that go into the adapter file."""

    @abstractmethod
    def remove(self) -> None:
        """Take everything out of the backbone again."""

    def parameters(self) -> list[nn.Parameter]:
        """All trainable weights."""
        return [parameter for group in self.groups() for _, parameter in group["params"]]
