"""The loss of a batch."""

from torch import Tensor

from rite_diffusion.concepts import Method
from rite_diffusion.config import TrainConfig
from rite_diffusion.training.batch import Batch
from rite_diffusion.training.objective import (
    add_noise,
    huber_error,
    masked_mean,
    squared_error,
    target_of,
    timestep_weight,
)
from rite_diffusion.types import Backbone


def batch_loss(backbone: Backbone, method: Method, batch: Batch, config: TrainConfig) -> Tensor:
    """The mean loss of a batch (Ho et al. 2020, Alg. 1, on latents)."""
    goal, kind = config.objective, backbone.prediction_type
    signal = backbone.alphas_cumprod[batch.timesteps]  # (B,)
    noisy = add_noise(batch.latents, batch.seen, signal)
    prediction = backbone.denoise(noisy, batch.timesteps, method.conditioning(batch.captions))
    target = target_of(kind, batch.latents, batch.noise, signal)
    if goal.loss == "huber":
        error = huber_error(prediction, target, goal.huber_delta)
    else:
        error = squared_error(prediction, target)
    weight = batch.weights * timestep_weight(kind, signal, goal.weighting, goal.min_snr_gamma)
    loss = (masked_mean(error, batch.masks) * weight).mean()
    return loss + method.penalty(batch.captions, batch.masks)
