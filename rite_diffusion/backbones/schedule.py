"""A base model's noise schedule, read from its scheduler, and a sampler for it."""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from rite_diffusion.backbones.protocols import Levels, PredictionType
from rite_diffusion.errors import BackboneError, ConfigError

KINDS: tuple[PredictionType, ...] = ("epsilon", "v_prediction")  # of schedules in discrete steps
UNSUPPORTED = ("use_dynamic_shifting", "invert_sigmas")  # of a flow's configuration


def prediction_type(scheduler: Any, name: str) -> PredictionType:
    """The prediction type of a diffusers scheduler's model; BackboneError if unsupported."""
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return "flow"
    kind = scheduler.config.get("prediction_type")
    if kind not in KINDS or "alphas_cumprod" not in vars(scheduler):
        raise BackboneError(
            f"{name} has a {type(scheduler).__name__} for predictions of '{kind}', which is not "
            "supported: its noise schedule must be DDPM's (epsilon, v_prediction) or "
            "FlowMatchEulerDiscreteScheduler's."
        )
    return kind


@dataclass(frozen=True)
class TableSchedule:
    """A noise schedule of T discrete timesteps; noise increases with the timestep."""

    signal: Tensor  # (T,)
    sigma: Tensor  # (T,)
    times: Tensor  # (T,) the denoiser's time input
    snr: Tensor  # (T,) (signal / sigma)^2

    def __len__(self) -> int:
        """The number of timesteps T."""
        return len(self.times)

    def to(self, device: torch.device) -> "TableSchedule":
        """The schedule on a device."""
        tables = (self.signal, self.sigma, self.times, self.snr)
        return TableSchedule(*(table.to(device) for table in tables))

    def levels(self, places: Tensor, cells: tuple[int, int], shift: float | None = None) -> Levels:
        """The noise levels of the timesteps at places (B,) in [0, 1), for latents of any size."""
        if shift is not None:
            raise ConfigError("objective.shift is for bases with a continuous flow: leave it out.")
        at = (places * len(self)).long().clamp(max=len(self) - 1).to(self.times.device)
        return Levels(self.signal[at], self.sigma[at], self.times[at], self.snr[at])


def noise_schedule(scheduler: Any, name: str) -> TableSchedule:
    """The noise schedule of a diffusers scheduler that `prediction_type` accepts."""
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return _flow_schedule(scheduler, name)
    return ddpm_schedule(scheduler.alphas_cumprod)


def ddpm_schedule(shares: Tensor) -> TableSchedule:
    """The schedule x_t = sqrt(a) x_0 + sqrt(1 - a) noise (Ho et al. 2020, Eq. 4) of `shares` a."""
    snr = shares / (1 - shares).clamp(min=1e-8)
    return TableSchedule(shares.sqrt(), (1 - shares).sqrt(), torch.arange(len(shares)), snr)


def flow_schedule(sigmas: Tensor, length: int) -> TableSchedule:
    """The schedule x_t = (1 - sigma) x_0 + sigma noise (Liu et al. 2023) of sigmas (T,) in (0, 1].

    The denoiser's time input is sigma * length.
    """
    signal = 1 - sigmas
    return TableSchedule(signal, sigmas, sigmas * length, (signal / sigmas).square())


def _flow_schedule(scheduler: FlowMatchEulerDiscreteScheduler, name: str) -> TableSchedule:
    odd = [key for key in UNSUPPORTED if scheduler.config[key]]
    if odd:
        raise BackboneError(f"{name} has a flow schedule with {odd[0]}, which is not supported")
    rising = torch.as_tensor(scheduler.sigmas).flip(0)  # diffusers lists the noisiest first
    return flow_schedule(rising, scheduler.config["num_train_timesteps"])


def sampler(kind: PredictionType, config: Any) -> "DDIMScheduler | FlowSampler":
    """A deterministic sampler for the model's schedule: Euler for flows, else DDIM (Song 2021)."""
    if kind == "flow":
        scheduler = FlowSampler.from_config(config, stochastic_sampling=False)
        assert isinstance(scheduler, FlowSampler)
        return scheduler
    scheduler = DDIMScheduler.from_config(config, clip_sample=False)
    assert isinstance(scheduler, DDIMScheduler)
    return scheduler


@dataclass
class FlowStep:
    """The result of a sampler's step: the next latents x_{t-1}, and the estimate of x_0."""

    prev_sample: Tensor
    pred_original_sample: Tensor


class FlowSampler(FlowMatchEulerDiscreteScheduler):
    """Euler's method for a rectified flow, with the interface of diffusers' DDIMScheduler."""

    init_noise_sigma = 1.0

    def scale_model_input(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """The latents unchanged: a flow model takes them as they are."""
        return sample

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor) -> FlowStep:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step to the next timestep; x_0 = x_t - sigma v for the velocity v = model_output."""
        sigma = timestep / self.config["num_train_timesteps"]
        [latents] = super().step(model_output, timestep, sample, return_dict=False)  # pyright: ignore[reportArgumentType]
        return FlowStep(latents, sample - sigma * model_output)
