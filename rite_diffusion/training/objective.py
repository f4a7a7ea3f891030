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


def min_snr_weight(kind: PredictionType, signal: Tensor, gamma: float) -> Tensor:
    """Weights (B,) of the prediction's squared error (Hang et al. 2023, Sec. 3.4).

    min(SNR, gamma) / SNR for noise, min(SNR, gamma) / (SNR + 1) for velocity.
    """
    snr = signal / (1 - signal).clamp(min=1e-8)
    divisor = snr if kind == "epsilon" else snr + 1
    return torch.clamp(snr, max=gamma) / divisor.clamp(min=1e-8)


def stratified_timesteps(count: int, length: int, generator: torch.Generator) -> Tensor:
    """Timesteps (count,) in [0, length), one from each of `count` equal parts, in random order."""
    parts = torch.randperm(count, generator=generator)
    places = (parts + torch.rand(count, generator=generator)) / count
    return (places * length).long().clamp(max=length - 1)


def diffusion_loss(
    prediction: Tensor, target: Tensor, kind: PredictionType, signal: Tensor, gamma: float | None
) -> Tensor:
    """Mean squared error, per picture weighted by min-SNR where `gamma` is set."""
    error = (prediction.float() - target.float()).square().flatten(1).mean(1)
    if gamma is not None:
        error = error * min_snr_weight(kind, signal, gamma)
    return error.mean()
