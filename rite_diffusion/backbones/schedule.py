"""The noise schedule of a base model, read from its scheduler, and the sampler that follows it."""

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
    """What the model of a diffusers scheduler predicts; BackboneError for what none here learns."""
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
    """A noise schedule of T discrete timesteps; later ones have more noise."""

    signal: Tensor  # (T,)
    sigma: Tensor  # (T,)
    times: Tensor  # (T,) what the model is told
    snr: Tensor  # (T,) (signal / sigma)^2

    def __len__(self) -> int:
        """The number of timesteps T."""
        return len(self.times)

    def to(self, device: torch.device) -> "TableSchedule":
        """The schedule on a device."""
        tables = (self.signal, self.sigma, self.times, self.snr)
        return TableSchedule(*(table.to(device) for table in tables))

    def levels(self, places: Tensor, cells: tuple[int, int], shift: float | None = None) -> Levels:
        """The levels of the timesteps at places (B,) in [0, 1); they are the same at every size."""
        if shift is not None:
            raise ConfigError("objective.shift is for bases with a continuous flow: leave it out.")
        at = (places * len(self)).long().clamp(max=len(self) - 1).to(self.times.device)
        return Levels(self.signal[at], self.sigma[at], self.times[at], self.snr[at])


def noise_schedule(scheduler: Any, name: str) -> TableSchedule:
    """The schedule of a diffusers scheduler that `prediction_type` accepts."""
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return _flow_schedule(scheduler, name)
    return ddpm_schedule(scheduler.alphas_cumprod)


def ddpm_schedule(shares: Tensor) -> TableSchedule:
    """x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise (Ho et al. 2020, Eq. 4), from the a_t (T,)."""
    snr = shares / (1 - shares).clamp(min=1e-8)
    return TableSchedule(shares.sqrt(), (1 - shares).sqrt(), torch.arange(len(shares)), snr)


def flow_schedule(sigmas: Tensor, length: int) -> TableSchedule:
    """x_t = (1 - sigma) x_0 + sigma noise (Liu et al. 2023), from sigmas (T,) in (0, 1].

    The model is told sigma times `length`.
    """
    signal = 1 - sigmas
    return TableSchedule(signal, sigmas, sigmas * length, (signal / sigmas).square())


def _flow_schedule(scheduler: FlowMatchEulerDiscreteScheduler, name: str) -> TableSchedule:
    odd = [key for key in UNSUPPORTED if scheduler.config[key]]
    if odd:
        raise BackboneError(f"{name} has a flow schedule with {odd[0]}, which is not supported")
    rising = torch.as_tensor(scheduler.sigmas).flip(0)  # diffusers has the noisiest first
    return flow_schedule(rising, scheduler.config["num_train_timesteps"])


def sampler(kind: PredictionType, config: Any) -> "DDIMScheduler | FlowSampler":
    """A deterministic sampler on the model's own schedule: DDIM (Song et al. 2021), or Euler."""
    if kind == "flow":
        scheduler = FlowSampler.from_config(config, stochastic_sampling=False)
        assert isinstance(scheduler, FlowSampler)
        return scheduler
    scheduler = DDIMScheduler.from_config(config, clip_sample=False)
    assert isinstance(scheduler, DDIMScheduler)
    return scheduler


@dataclass
class FlowStep:
    """What one step of a flow makes: latents with less noise, and where they are heading."""

    prev_sample: Tensor
    pred_original_sample: Tensor


class FlowSampler(FlowMatchEulerDiscreteScheduler):
    """Euler steps along a rectified flow, called as DDIM's are."""

    init_noise_sigma = 1.0

    def scale_model_input(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """The latents as the model sees them."""
        return sample

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor) -> FlowStep:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The step from a timestep to the next; x_0 = x_t - sigma v for a velocity v."""
        sigma = timestep / self.config["num_train_timesteps"]
        [made] = super().step(model_output, timestep, sample, return_dict=False)  # pyright: ignore[reportArgumentType]
        return FlowStep(made, sample - sigma * model_output)
