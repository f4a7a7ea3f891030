"""What the denoiser is asked for and how its errors are weighed.

With signal share a_t (`alphas_cumprod`): x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise.
"""

import torch
from torch import Tensor

from rite_diffusion.types import PredictionType


def _broadcast(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.ndim - 1))


def add_noise(latents: Tensor, noise: Tensor, signal: Tensor) -> Tensor:
    """Noisy latents at signal shares (B,) (Ho et al. 2020, Eq. 4)."""
    signal = _broadcast(signal, latents)
    return signal.sqrt() * latents + (1 - signal).sqrt() * noise


def target_of(kind: PredictionType, latents: Tensor, noise: Tensor, signal: Tensor) -> Tensor:
    """What the model should predict: the noise, or the velocity (Salimans & Ho 2022, Sec. 4)."""
    if kind == "epsilon":
        return noise
    signal = _broadcast(signal, latents)
    return signal.sqrt() * noise - (1 - signal).sqrt() * latents


def offset_noise(noise: Tensor, offset: float, generator: torch.Generator) -> Tensor:
    """Noise (B, C, h, w) with a random value per channel added, for darker and lighter pictures.

    Guttenberg 2023, "Diffusion with offset noise".
    """
    shift = torch.randn(noise.shape[0], noise.shape[1], 1, 1, generator=generator)
    return noise + offset * shift.to(noise)


def perturb(noise: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    """Noise for the input alone (Ning et al. 2023, Alg. 1); the target keeps the original."""
    return noise + amount * torch.randn(noise.shape, generator=generator).to(noise)


def timestep_weight(kind: PredictionType, signal: Tensor, weighting: str, gamma: float) -> Tensor:
    """Weights (B,) of the prediction's squared error.

    On the clean latents' error the weight is min(SNR, gamma) (`min_snr`, Hang et al. 2023,
    Sec. 3.4) or sqrt(SNR) (`debiased`, Yu et al. 2023); the error of predicted noise is SNR times
    the clean latents', that of a predicted velocity SNR + 1 times.
    """
    if weighting == "none":
        return torch.ones_like(signal)
    snr = signal / (1 - signal).clamp(min=1e-8)
    wanted = snr.clamp(max=gamma) if weighting == "min_snr" else snr.sqrt()
    divisor = snr if kind == "epsilon" else snr + 1
    return wanted / divisor.clamp(min=1e-8)


def stratified_timesteps(
    count: int, length: int, generator: torch.Generator, logit_normal: tuple[float, float] | None
) -> Tensor:
    """Timesteps (count,) in [0, length), one from each of `count` equal parts, in random order.

    Uniform, or with mean and deviation the logit-normal density of Esser et al. 2024, Sec. 3.1.
    """
    parts = torch.randperm(count, generator=generator)
    places = (parts + torch.rand(count, generator=generator)) / count  # uniform in [0, 1)
    if logit_normal is not None:
        mean, deviation = logit_normal
        places = torch.sigmoid(mean + deviation * torch.special.ndtri(places.clamp(min=1e-6)))
    return (places * length).long().clamp(max=length - 1)


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
