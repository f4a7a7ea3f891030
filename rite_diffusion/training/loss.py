"""The training loss of a batch."""

from torch import Tensor

from rite_diffusion.backbones.protocols import Backbone
from rite_diffusion.config import ObjectiveSection
from rite_diffusion.methods import Method
from rite_diffusion.training.batch import DEFAULT_OBJECTIVE, Batch
from rite_diffusion.training.objective import (
    TARGETS,
    add_noise,
    huber_error,
    masked_mean,
    squared_error,
    timestep_weight,
)


def diffusion_loss(
    backbone: Backbone,
    batch: Batch,
    *,
    objective: ObjectiveSection = DEFAULT_OBJECTIVE,
    method: Method | None = None,
) -> Tensor:
    """The mean loss of a batch, a scalar (Ho et al. 2020, Alg. 1, on latents).

    `objective` sets the loss function and the weights of timesteps. A `method` encodes the captions
    and may add a penalty; without one the backbone encodes them.
    """
    goal, kind = objective, backbone.prediction_type
    height, width = batch.latents.shape[-2:]
    at = backbone.noise_schedule.levels(batch.places, (height, width), goal.shift)
    noisy = add_noise(batch.latents, batch.input_noise, at.signal, at.sigma)
    encode = method.conditioning if method else backbone.encode_captions
    conditioning = encode(batch.captions)
    prediction = backbone.denoise(noisy, at.times, conditioning, goal.guidance)
    target = TARGETS[kind](batch.latents, batch.noise, at.signal, at.sigma)
    if goal.loss == "huber":
        error = huber_error(prediction, target, goal.huber_delta)
    else:
        error = squared_error(prediction, target)
    weight = batch.weights * timestep_weight(kind, at.snr, goal.weighting, goal.min_snr_gamma)
    loss = (masked_mean(error, batch.masks) * weight).mean()
    return loss + method.penalty(batch.captions, batch.masks) if method else loss
