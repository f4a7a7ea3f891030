"""The training loop: straight-line, and every random choice a function of (seed, step)."""

import math
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
from rite_diffusion.photos.buckets import batch_indices
from rite_diffusion.photos.dataset import LatentSet
from rite_diffusion.photos.random import generator
from rite_diffusion.training.average import WeightAverage
from rite_diffusion.training.objective import (
    add_noise,
    huber_error,
    masked_mean,
    offset_noise,
    perturb,
    squared_error,
    stratified_timesteps,
    target_of,
    timestep_weight,
)
from rite_diffusion.training.processes import average_gradients, mean_over_processes
from rite_diffusion.training.snapshot import Snapshot, put_back, take
from rite_diffusion.types import Backbone, ConfigError, OptimizerError, RunError

# Streams of random numbers; 0 is the samples' order.
NOISE, TIMESTEPS, DROPOUT, OFFSET, PERTURBATION = 1, 2, 3, 4, 5
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


@dataclass(frozen=True)
class Batch:
    """What one optimizer step learns from; all random choices are made."""

    indices: list[int]  # of the samples in the data
    captions: list[str]
    latents: Tensor  # (B, C, h, w)
    noise: Tensor  # of the same shape
    seen: Tensor  # the noise that the model sees; differs with input perturbation
    timesteps: Tensor  # (B,)
    masks: Tensor | None  # (B, 1, h, w) weights of the latent cells' errors

    def parts(self, count: int) -> list["Batch"]:
        """The batch in so many equal parts."""
        size = len(self.indices) // count
        slices = [slice(start, start + size) for start in range(0, size * count, size)]
        return [
            Batch(
                self.indices[part],
                self.captions[part],
                self.latents[part],
                self.noise[part],
                self.seen[part],
                self.timesteps[part],
                self.masks[part] if self.masks is not None else None,
            )
            for part in slices
        ]


def draw_batch(
    backbone: Backbone, data: LatentSet, config: TrainConfig, step: int, processes: int = 1
) -> Batch:
    """A step's batch for all processes: a function of the seed and the step alone."""
    goal, count = config.objective, config.batch * config.accumulate * processes

    def stream(number: int) -> torch.Generator:
        return generator(config.seed, step, number)

    indices = batch_indices(data.buckets, count, config.seed, step)
    rows = [data.samples[index] for index in indices]
    latents = torch.stack([data.latents[row] for row in rows])
    masks = torch.stack([data.masks[row] for row in rows]) if data.masks is not None else None
    captions = [data.captions[index] for index in indices]
    captions = drop_captions(captions, goal.caption_dropout, config.seed, step)
    density = (goal.timestep_mean, goal.timestep_deviation)
    timesteps = stratified_timesteps(
        count,
        len(backbone.alphas_cumprod),
        stream(TIMESTEPS),
        density if goal.timesteps == "logit_normal" else None,
    )
    noise = torch.randn(latents.shape, generator=stream(NOISE))
    if goal.noise_offset:
        noise = offset_noise(noise, goal.noise_offset, stream(OFFSET))
    seen = noise
    if goal.input_perturbation:
        seen = perturb(noise, goal.input_perturbation, stream(PERTURBATION))
    latents, noise, seen, timesteps = (
        each.to(backbone.device) for each in (latents, noise, seen, timesteps)
    )
    if masks is not None:
        masks = masks.clamp(min=goal.mask_floor).to(backbone.device)
    return Batch(indices, captions, latents, noise, seen, timesteps, masks)


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
    weight = timestep_weight(kind, signal, goal.weighting, goal.min_snr_gamma)
    return (masked_mean(error, batch.masks) * weight).mean()


def accumulate_gradients(
    accelerator: Accelerator, backbone: Backbone, method: Method, batch: Batch, config: TrainConfig
) -> float:
    """Gradients of the batch's mean loss, this process's share of it; returns that loss."""
    processes = accelerator.num_processes
    value = 0.0
    for part in batch.parts(config.accumulate * processes)[accelerator.process_index :: processes]:
        with accelerator.autocast():
            loss = batch_loss(backbone, method, part, config) / config.accumulate
        accelerator.backward(loss)
        value += loss.item()
    average_gradients(accelerator, method.parameters())
    return mean_over_processes(accelerator, value)


def bad_loss(value: float, step: int, names: set[str], config: TrainConfig) -> RunError:
    """The error of a run whose loss is no number any more; it names the last batch's photos."""
    return RunError(
        f"the loss is {value} in {BAD_STEPS} steps up to {step + 1}, at last with "
        f"{', '.join(sorted(names))}: lower optim.lr (now {config.optim.lr:g}), or use another "
        f"precision than {config.precision}."
    )


def new_accelerator(backbone: Backbone, config: TrainConfig) -> Accelerator:
    """The accelerator of a run; a process may train twice, at two precisions."""
    AcceleratorState._reset_state()
    return Accelerator(
        cpu=backbone.device.type == "cpu",
        mixed_precision={"fp32": "no"}.get(config.precision, config.precision),
    )


def train_steps(
    backbone: Backbone,
    method: Method,
    data: LatentSet,
    config: TrainConfig,
    listen: Callable[[StepReport], None],
    save: Callable[[Snapshot, bool], None] = lambda snapshot, last: None,
    stop: Callable[[], bool] = lambda: False,
    resume: Snapshot | None = None,
) -> int:
    """Run all steps, or those after `resume`, until `stop` says so; returns the steps done.

    `listen` hears of every step; `save` gets a snapshot, and whether it is the last, at every
    checkpoint and at the end; while they run, averaged weights (`config.ema`) are in place. A step
    whose loss is no number changes nothing; RunError after five in a row.
    """
    accelerator = new_accelerator(backbone, config)
    optimizer = build_optimizer(method, config)
    peaks = [group["lr"] for group in optimizer.param_groups]
    factor = rate_factor(config.optim, config.steps)
    average = WeightAverage([n for group in method.groups() for n in group["params"]], config.ema)
    if resume is not None:
        put_back(resume, optimizer, average)
        if resume.step >= config.steps:  # all steps were done, but the adapter was not written
            with average.swapped_in():
                save(resume, True)
            return resume.step
    backbone.checkpoint_gradients(config.gradient_checkpointing)
    stepper = accelerator.prepare(optimizer)
    parameters = method.parameters()
    bad = 0
    for step in range(resume.step if resume else 0, config.steps):
        start = time.perf_counter()
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * factor(step)
        batch = draw_batch(backbone, data, config, step, accelerator.num_processes)
        value = accumulate_gradients(accelerator, backbone, method, batch, config)
        bad = 0 if math.isfinite(value) else bad + 1
        if not bad:
            accelerator.clip_grad_norm_(parameters, config.optim.clip_norm)
            stepper.step()
            average.update(step)
        elif bad == BAD_STEPS:
            raise bad_loss(value, step, {data.names[index] for index in batch.indices}, config)
        stepper.zero_grad()
        speed = len(batch.indices) / (time.perf_counter() - start)
        stopped = mean_over_processes(accelerator, float(stop())) > 0
        last = stopped or step + 1 == config.steps
        wanted = last or (step + 1) % config.checkpoints.every == 0
        snapshot = take(step + 1, optimizer, average) if wanted else None
        with average.swapped_in():
            listen(StepReport(step + 1, value, optimizer.param_groups[0]["lr"], speed))
            if snapshot is not None:
                save(snapshot, last)
        if last:
            return step + 1
    return config.steps
