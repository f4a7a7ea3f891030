"""The training loop: straight-line, and every random choice a function of (seed, step)."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor

from rite_diffusion.concepts import Method
from rite_diffusion.config import OptimSection, TrainConfig
from rite_diffusion.optim import OPTIMIZERS
from rite_diffusion.photos.dataset import LatentSet, batch_indices, generator
from rite_diffusion.training.objective import (
    add_noise,
    diffusion_loss,
    stratified_timesteps,
    target_of,
)
from rite_diffusion.training.snapshot import Snapshot, put_back, take
from rite_diffusion.types import Backbone, ConfigError, OptimizerError, RunError

NOISE, TIMESTEPS, DROPOUT = 1, 2, 3  # streams of random numbers; 0 is the samples' order
BAD_STEPS = 5  # losses in a row that are no number before the run stops


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step tells its listeners."""

    step: int  # steps done
    loss: float
    rate: float  # learning rate of the first group
    images_per_second: float


def rate_factor(optim: OptimSection, steps: int) -> Callable[[int], float]:
    """Learning-rate factor of a step: linear warm-up, then constant, cosine or linear to zero."""
    decays = {
        "constant": lambda progress: 1.0,
        "linear": lambda progress: 1.0 - progress,
        "cosine": lambda progress: 0.5 + 0.5 * float(torch.cos(torch.tensor(torch.pi * progress))),
    }
    decay = decays[optim.schedule]
    return lambda step: min(1.0, (step + 1) / (optim.warmup + 1)) * decay(min(1.0, step / steps))


def build_optimizer(method: Method, config: TrainConfig) -> torch.optim.Optimizer:
    """The configured optimizer over the method's parameter groups."""
    optim = config.optim
    try:
        return optimizer_spec(optim.name).build(method.groups(), **optim.options)
    except (OptimizerError, TypeError) as error:
        raise ConfigError(f"optimizer '{optim.name}': {error}") from None


def optimizer_spec(name: str):
    """The optimizer's specification; ConfigError names the known ones."""
    if name not in OPTIMIZERS:
        raise ConfigError(f"no optimizer '{name}': choose one of {', '.join(sorted(OPTIMIZERS))}")
    return OPTIMIZERS[name]


def drop_captions(captions: list[str], share: float, seed: int, step: int) -> list[str]:
    """The captions, a random share of them replaced by the empty one."""
    draws = torch.rand(len(captions), generator=generator(seed, step, DROPOUT)).tolist()
    return ["" if draw < share else text for draw, text in zip(draws, captions, strict=True)]


def step_loss(
    backbone: Backbone, method: Method, data: LatentSet, config: TrainConfig, step: int
) -> Tensor:
    """The loss of one step's batch (Ho et al. 2020, Alg. 1, on latents)."""
    chosen = batch_indices(len(data.captions), config.batch, config.seed, step)
    latents = data.latents[chosen].to(backbone.device)  # (B, C, h, w)
    captions = [data.captions[index] for index in chosen]
    captions = drop_captions(captions, config.objective.caption_dropout, config.seed, step)
    clock = generator(config.seed, step, TIMESTEPS)
    timesteps = stratified_timesteps(config.batch, len(backbone.alphas_cumprod), clock)
    timesteps = timesteps.to(backbone.device)  # (B,)
    noise = torch.randn(latents.shape, generator=generator(config.seed, step, NOISE))
    noise = noise.to(backbone.device)
    signal = backbone.alphas_cumprod[timesteps]  # (B,)
    noisy = add_noise(latents, noise, signal)
    prediction = backbone.denoise(noisy, timesteps, method.conditioning(captions))
    kind = backbone.prediction_type
    target = target_of(kind, latents, noise, signal)
    return diffusion_loss(prediction, target, kind, signal, config.objective.min_snr_gamma)


def train_steps(
    backbone: Backbone,
    method: Method,
    data: LatentSet,
    config: TrainConfig,
    listen: Callable[[StepReport], None],
    save: Callable[[Snapshot], None] = lambda snapshot: None,
    stop: Callable[[], bool] = lambda: False,
    resume: Snapshot | None = None,
) -> int:
    """Run all steps, or those after `resume`, until `stop` says so; returns the steps done.

    `listen` hears of every step; `save` gets a snapshot at every checkpoint and at the end. A step
    whose loss is no number changes nothing; RunError after five in a row.
    """
    AcceleratorState._reset_state()  # a process may train twice, at two precisions
    accelerator = Accelerator(
        cpu=backbone.device.type == "cpu",
        mixed_precision={"fp32": "no"}.get(config.precision, config.precision),
    )
    optimizer = build_optimizer(method, config)
    peaks = [group["lr"] for group in optimizer.param_groups]
    factor = rate_factor(config.optim, config.steps)
    if resume is not None:
        put_back(resume, optimizer)
    stepper = accelerator.prepare(optimizer)
    parameters = method.parameters()
    bad = 0
    for step in range(resume.step if resume else 0, config.steps):
        start = time.perf_counter()
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * factor(step)
        with accelerator.autocast():
            loss = step_loss(backbone, method, data, config, step)
        accelerator.backward(loss)
        value = loss.item()
        bad = 0 if value == value and abs(value) != float("inf") else bad + 1
        if not bad:
            accelerator.clip_grad_norm_(parameters, config.optim.clip_norm)
            stepper.step()
        elif bad == BAD_STEPS:
            raise RunError(
                f"the loss is {value} in {bad} steps up to {step + 1}: lower optim.lr "
                f"(now {config.optim.lr:g}), or use another precision than {config.precision}."
            )
        stepper.zero_grad()
        speed = config.batch / (time.perf_counter() - start)
        listen(StepReport(step + 1, value, optimizer.param_groups[0]["lr"], speed))
        last = stop() or step + 1 == config.steps
        if last or (step + 1) % config.checkpoints.every == 0:
            save(take(step + 1, optimizer))
        if last:
            return step + 1
    return config.steps
