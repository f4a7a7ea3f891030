"""The parts of a training step as a `TrainConfig` sets them."""

from torch import Tensor

from rite_diffusion.backbones.protocols import Backbone
from rite_diffusion.config import TrainConfig
from rite_diffusion.methods import Method
from rite_diffusion.photos.dataset import LatentSet
from rite_diffusion.training.batch import Batch, draw_batch
from rite_diffusion.training.loss import diffusion_loss


def step_batch(
    backbone: Backbone, data: LatentSet, config: TrainConfig, step: int, processes: int = 1
) -> Batch:
    """A step's batch for all processes; steps are counted from 0."""
    return draw_batch(
        backbone,
        data,
        step,
        size=config.batch * config.accumulate * processes,
        seed=config.seed,
        objective=config.objective,
        captions=config.captions,
    )


def step_loss(backbone: Backbone, method: Method, batch: Batch, config: TrainConfig) -> Tensor:
    """The mean loss of a batch, the method's penalty included."""
    return diffusion_loss(backbone, batch, objective=config.objective, method=method)
