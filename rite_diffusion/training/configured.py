"""Batch and loss of a training step with the settings of a `TrainConfig`."""

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
    """The batch of a step, counted from 0, for all processes together."""
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
    """The mean loss of a batch with the method's penalty, a scalar."""
    return diffusion_loss(backbone, batch, objective=config.objective, method=method)
