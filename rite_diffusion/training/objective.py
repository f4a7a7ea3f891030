"""What the denoiser is asked for and how its errors are weighed.

Noisy latents are x_t = signal x_0 + sigma noise, with coefficients from the model's noise schedule.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from rite_diffusion.backbones.protocols import PredictionType


def _broadcast(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.ndim - 1))


def add_noise(latents: Tensor, noise: Tensor, signal: Tensor, sigma: Tensor) -> Tensor:
    """Noisy latents at signal and noise coefficients (B,) (Ho et al. 2020, Eq. 4)."""
    return _broadcast(signal, latents) * latents + _broadcast(sigma, latents) * noise


def noise_target(latents: Tensor, noise: Tensor, signal: Tensor, sigma: Tensor) -> Tensor:
    """The noise itself (Ho et al. 2020, Eq. 14)."""
    return noise


def velocity_target(latents: Tensor, noise: Tensor, signal: Tensor, sigma: Tensor) -> Tensor:
    """The velocity signal * noise - sigma * x_0 (Salimans & Ho 2022, Sec. 4)."""
    return _broadcast(signal, latents) * noise - _broadcast(sigma, latents) * latents


def flow_target(latents: Tensor, noise: Tensor, signal: Tensor, sigma: Tensor) -> Tensor:
    """The straight way noise - x_0 (Liu et al. 2023, Eq. 1, from the picture to the noise)."""
    return noise - latents


TARGETS: dict[PredictionType, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "epsilon": noise_target,
    "v_prediction": velocity_target,
    "flow": flow_target,
}


def offset_noise(noise: Tensor, offset: float, generator: torch.Generator) -> Tensor:
    """Noise (B, C, h, w) with a random value per channel added, for darker and lighter pictures.

    Guttenberg 2023, "Diffusion with offset noise".
    """
    shift = torch.randn(noise.shape[0], noise.shape[1], 1, 1, generator=generator)
    return noise + offset * shift.to(noise)


def perturb(noise: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    """Noise for the input alone (Ning et al. 2023, Alg. 1); the target keeps the original."""
    return noise + amount * torch.randn(noise.shape, generator=generator).to(noise)


def timestep_weight(kind: PredictionType, snr: Tensor, weighting: str, gamma: float) -> Tensor:
    """Weights (B,) of the prediction's squared error at signal-to-noise ratios (B,).

    On the clean latents' error the weight is min(SNR, gamma) (`min_snr`, Hang et al. 2023,
    Sec. 3.4) or sqrt(SNR) (`debiased`, Yu et al. 2023). The error of predicted noise is SNR times
    the clean latents', that of a predicted velocity 1 / sigma^2 times: SNR + 1 times where
    signal^2 + sigma^2 = 1, (sqrt(SNR) + 1)^2 times where signal + sigma = 1, as in a flow.
    """
    if weighting == "none":
        return torch.ones_like(snr)
    wanted = snr.clamp(max=gamma) if weighting == "min_snr" else snr.sqrt()
    divisors = {"epsilon": snr, "v_prediction": snr + 1, "flow": (snr.sqrt() + 1).square()}
    return wanted / divisors[kind].clamp(min=1e-8)


def stratified_places(
    count: int, generator: torch.Generator, logit_normal: tuple[float, float] | None
) -> Tensor:
    """Places (count,) in [0, 1), one from each of `count` equal parts, in random order.

    Uniform, or with mean and deviation the logit-normal density of Esser et al. 2024, Sec. 3.1.
    """
    parts = torch.randperm(count, generator=generator)
    places = (parts + torch.rand(count, generator=generator)) / count  # uniform in [0, 1)
    if logit_normal is not None:
        mean, deviation = logit_normal
        places = torch.sigmoid(mean + deviation * torch.special.ndtri(places.clamp(min=1e-6)))
    return places


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Squared error of each value (B, C, h, w)."""
    return (prediction.float() - target.float()).square()


def huber_error(prediction: Tensor, target: Tensor, delta: float) -> Tensor:
    """Pseudo-Huber error of each value (B, C, h, w) (Charbonnier et al. 1997).

    2 delta (sqrt(e^2 + delta^2) - delta): e^2 for small errors, linear for large ones.
    """
    error = (prediction.float() - target.float()).square()
    return 2 * delta * ((error + delta**2).sqrt() - delta)


def masked_mean(error: Tensor, masks: Tensor | None) -> Tensor:
    """Mean error of each picture (B,), weighted by its mask (B, 1, h, w) where there are masks.

    Normalised per picture, so that a small subject counts as much as a large one.
    """
    if masks is None:
        return error.flatten(1).mean(1)
    total = masks.flatten(1).sum(1).clamp(min=1e-6) * error.shape[1]
    return (error * masks).flatten(1).sum(1) / total
