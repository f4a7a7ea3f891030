"""`optim.lr = "auto"`: a learning rate found by short trials."""

from collections.abc import Callable

from rite_diffusion.backbones.protocols import Backbone
from rite_diffusion.config import TrainConfig
from rite_diffusion.methods import Method
from rite_diffusion.photos.dataset import LatentSet
from rite_diffusion.training.first_gradient import start_pairs
from rite_diffusion.training.job import Job
from rite_diffusion.training.trainer import Trainer
from rite_diffusion.training.validation import held_out_loss

FACTORS = (1 / 9, 1 / 3, 1.0, 3.0, 9.0)  # of the optimizer's default rate
STEPS = 20  # per trial


def probe_rates(
    backbone: Backbone,
    new_method: Callable[[TrainConfig], Method],
    data: LatentSet,
    config: TrainConfig,
    default: float,
) -> dict[float, float]:
    """Rate -> loss on the training photos, at fixed timesteps and noise, after 20 steps.

    Every trial starts from new weights and uses the same batches, so that only the rates differ.
    """
    short = config.optim.model_copy(update={"schedule": "constant", "warmup": 0})
    config = config.model_copy(update={"optim": short, "ema": 0.0})
    rates = [factor * default for factor in FACTORS]
    return {rate: _trial(backbone, new_method, data, config.with_rates(rate)) for rate in rates}


def _trial(
    backbone: Backbone,
    new_method: Callable[[TrainConfig], Method],
    data: LatentSet,
    config: TrainConfig,
) -> float:
    method = new_method(config)
    try:
        job = Job(backbone, method, data, config)
        start_pairs(job)
        trainer = Trainer(job)
        for step in range(STEPS):
            trainer.step(step)
        with trainer.averaged(), trainer.precision.autocast():
            return held_out_loss(backbone, method, data, config)
    finally:
        method.remove()
