"""A training's parts together."""

from dataclasses import dataclass

from rite_diffusion.backbones.protocols import Backbone
from rite_diffusion.config import TrainConfig
from rite_diffusion.methods import Method
from rite_diffusion.photos.dataset import LatentSet


@dataclass(frozen=True)
class Job:
    """A method on a backbone, the data it trains on, and the settings."""

    backbone: Backbone
    method: Method
    data: LatentSet
    config: TrainConfig
    held_out: LatentSet | None = None  # for the validation loss
