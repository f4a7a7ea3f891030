"""Targets of the denoiser, and losses with their weights.

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
    """The flow's velocity noise - x_0 (Liu et al. 2023, Eq. 1, from picture to noise)."""
    return noise - latents


TARGETS: dict[PredictionType, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "epsilon": noise_target,
    "v_prediction": velocity_target,
    "flow": flow_target,
}


def offset_noise(noise: Tensor, offset: float, generator: torch.Generator) -> Tensor:
    """Noise (B, C, h, w) with a random offset per channel (Guttenberg 2023).

    Lets the model learn darker and lighter pictures.
    """
    shift = torch.randn(noise.shape[0], noise.shape[1], 1, 1, generator=generator)
    return noise + offset * shift.to(noise)


def perturb(noise: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    """Noise for the model's input (Ning et al. 2023, Alg. 1); the target keeps the original."""
    return noise + amount * torch.randn(noise.shape, generator=generator).to(noise)


def timestep_weight(kind: PredictionType, snr: Tensor, weighting: str, gamma: float) -> Tensor:
    """Weights (B,) of the squared error at signal-to-noise ratios (B,).

    Expressed for the error of the clean latents, the weight is min(SNR, gamma) (`min_snr`, Hang et
    al. 2023, Sec. 3.4) or sqrt(SNR) (`debiased`, Yu et al. 2023). The error of predicted noise is
    SNR times that of the clean latents. The error of a predicted velocity is 1 / sigma^2 times it,
    which is SNR + 1 where signal^2 + sigma^2 = 1, and (sqrt(SNR) + 1)^2 in a flow, where
    signal + sigma = 1.
    """
    if weighting == "none":
        return torch.ones_like(snr)
    wanted = snr.clamp(max=gamma) if weighting == "min_snr" else snr.sqrt()
    divisors = {"epsilon": snr, "v_prediction": snr + 1, "flow": (snr.sqrt() + 1).square()}
    return wanted / divisors[kind].clamp(min=1e-8)


def stratified_places(
    count: int, generator: torch.Generator, logit_normal: tuple[float, float] | None
) -> Tensor:
    """Places (count,) in [0, 1), one from each of `count` equally likely parts, shuffled.

    Uniform, or of the logit-normal density with (mean, deviation) (Esser et al. 2024, Sec. 3.1).
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
    """Mean error (B,) of each picture, weighted by its mask (B, 1, h, w) if there are masks.

    Divided by each mask's sum, so that a small subject counts as much as a large one.
    """
    if masks is None:
        return error.flatten(1).mean(1)
    total = masks.flatten(1).sum(1).clamp(min=1e-6) * error.shape[1]
    return (error * masks).flatten(1).sum(1) / total
