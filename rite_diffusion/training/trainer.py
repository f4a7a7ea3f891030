"""The training loop; every random choice is a function of (seed, step)."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from accelerate import Accelerator

from rite_diffusion.backbones.protocols import Backbone
from rite_diffusion.config import TrainConfig
from rite_diffusion.errors import ConfigError, OptimizerError, RunError
from rite_diffusion.methods import Method
from rite_diffusion.optim import optimizer_spec
from rite_diffusion.optim.schedule_free import averaged
from rite_diffusion.training.average import WeightAverage
from rite_diffusion.training.batch import Batch
from rite_diffusion.training.configured import step_batch, step_loss
from rite_diffusion.training.first_gradient import start_pairs
from rite_diffusion.training.job import Job
from rite_diffusion.training.memory import is_out_of_memory, out_of_memory_error
from rite_diffusion.training.precision import MixedPrecision
from rite_diffusion.training.processes import (
    average_gradients,
    mean_over_processes,
    rendezvous_error,
    wait_for_all,
    without_ignored_variables,
)
from rite_diffusion.training.rates import rate_factor
from rite_diffusion.training.snapshot import Snapshot, restore_snapshot, take_snapshot
from rite_diffusion.training.validation import held_out_loss

BAD_STEPS = 5  # consecutive steps without a finite loss, after which the run stops


@dataclass(frozen=True)
class StepReport:
    """The figures of one optimizer step."""

    step: int  # steps done
    loss: float
    rate: float  # learning rate of the first group
    images_per_second: float
    skipped: list[str]  # photos of a step left out, as its loss or gradient was not finite
    validation: float | None  # loss on the held-out photos, where it was measured


def build_optimizer(method: Method, config: TrainConfig) -> torch.optim.Optimizer:
    """The configured optimizer over the method's parameter groups."""
    optim = config.optim
    try:
        return optimizer_spec(optim.name).build(method.groups(), **optim.options)
    except (OptimizerError, TypeError) as error:
        raise ConfigError(f"optimizer '{optim.name}': {error}") from None


def new_accelerator(backbone: Backbone) -> Accelerator:
    """The connection between the processes of a run; for precision see `MixedPrecision`."""
    try:
        with without_ignored_variables():
            return Accelerator(cpu=backbone.device.type == "cpu", mixed_precision="no")
    except torch.distributed.DistError as error:
        raise rendezvous_error(error) from error


class Trainer:
    """A job with its optimizer, which takes steps by number."""

    def __init__(self, job: Job, between: Callable[[], object] = lambda: None):
        """`between` is called before each part of a step, and may raise an exception to end it."""
        self.job, self._between = job, between
        self.accelerator = new_accelerator(job.backbone)
        self.precision = MixedPrecision(job.backbone.device, job.config.precision)
        self.optimizer = build_optimizer(job.method, job.config)
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]
        named = [named for group in job.method.groups() for named in group["params"]]
        self.average = WeightAverage(named, job.config.ema)
        self.parameters = [parameter for _, parameter in named]

    def step(self, step: int) -> tuple[float, Batch, bool]:
        """Take an optimizer step; returns loss, batch, and whether the weights were updated.

        They are not if the loss or a gradient is not finite.
        """
        job, accelerator = self.job, self.accelerator
        job.method.begin(step)
        start, length = job.method.schedule(step)
        factor = rate_factor(job.config.optim, length)(step - start)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * factor
        batch = step_batch(job.backbone, job.data, job.config, step, accelerator.num_processes)
        loss = self._gradients(batch)
        norm = self.precision.clip(self.optimizer, self.parameters, job.config.optim.clip_norm)
        usable = self.precision.handles_overflow or bool(torch.isfinite(norm))
        good = math.isfinite(loss) and usable
        if good:
            self.precision.step(self.optimizer)
            self.average.update(step)
        self.optimizer.zero_grad()
        return loss, batch, good

    def _gradients(self, batch: Batch) -> float:
        """Accumulate gradients of the batch's mean loss over all processes; returns the loss."""
        job, accelerator = self.job, self.accelerator
        processes, share = accelerator.num_processes, job.config.accumulate
        value = 0.0
        for part in batch.parts(share * processes)[accelerator.process_index :: processes]:
            self._between()
            with self.precision.autocast():
                loss = step_loss(job.backbone, job.method, part, job.config) / share
            self.precision.backward(loss)
            value += loss.item()
        average_gradients(accelerator, self.parameters)
        return mean_over_processes(accelerator, value)

    def snapshot(self, step: int) -> Snapshot:
        """The snapshot after `step` steps."""
        return take_snapshot(step, self.optimizer, self.average, self.precision)

    def restore(self, snapshot: Snapshot) -> None:
        """Load a snapshot; RunError for one of another model or method."""
        restore_snapshot(snapshot, self.optimizer, self.average, self.precision)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Let the averaged weights (`ema`, or the optimizer's own) act until the block ends."""
        with self.average.swapped_in(), averaged(self.optimizer):
            yield

    def validation(self) -> float | None:
        """The loss on the held-out photos, None where there are none."""
        job = self.job
        if job.held_out is None:
            return None
        with self.precision.autocast():
            return held_out_loss(job.backbone, job.method, job.held_out, job.config)


def bad_loss_error(value: float, step: int, names: list[str], config: TrainConfig) -> RunError:
    """The error of a run whose loss is not finite any more, with the last batch's photos."""
    return RunError(
        f"the loss or its gradient is no number in {BAD_STEPS} steps up to {step + 1} (loss "
        f"{value}), at last with {', '.join(names)}: lower optim.lr (now {config.optim.lr}), or "
        f"use another precision than {config.precision}."
    )


def train_steps(
    job: Job,
    on_step: Callable[[StepReport], None],
    save: Callable[[Snapshot, bool], None] = lambda snapshot, last: None,
    stop: Callable[[], bool] = lambda: False,
    resume: Snapshot | None = None,
    save_now: Callable[[], bool] = lambda: False,
) -> int:
    """Run all steps, or those after `resume`, until `stop` returns True; returns the steps done.

    `stop` is called after each step, and before each part of a step, where it may raise. `on_step`
    is called after every step; `save` gets a snapshot, and whether it is the last, at every
    checkpoint, when `save_now` returns True, and at the end. During both, the averaged weights
    (`config.ema`) are in place. A step whose loss or gradient is not finite changes nothing;
    RunError after five in a row.
    """
    config = job.config
    job.backbone.checkpoint_gradients(config.gradient_checkpointing)
    if resume is None:
        start_pairs(job)
    trainer = Trainer(job, between=stop)
    if resume is not None:
        trainer.restore(resume)
        if resume.step >= config.steps:  # all steps were done, but the adapter was not written
            with trainer.averaged():
                save(resume, True)
            wait_for_all(trainer.accelerator)
            return resume.step
    job.backbone.compile_denoiser(config.compile)
    bad = 0
    for step in range(resume.step if resume else 0, config.steps):
        start = time.perf_counter()
        try:
            loss, batch, good = trainer.step(step)
        except RuntimeError as error:
            raise (out_of_memory_error(config) if is_out_of_memory(error) else error) from None
        speed = len(batch.indices) / (time.perf_counter() - start)
        names = sorted({job.data.names[index] for index in batch.indices})
        bad = 0 if good else bad + 1
        if bad == BAD_STEPS:
            raise bad_loss_error(loss, step, names, config)
        stopped = mean_over_processes(trainer.accelerator, float(stop())) > 0
        last = stopped or step + 1 == config.steps
        with trainer.averaged():
            validated = last or (step + 1) % config.validation.every == 0
            rate = trainer.optimizer.param_groups[0]["lr"]
            skipped = [] if good else names
            validation = trainer.validation() if validated else None
            on_step(StepReport(step + 1, loss, rate, speed, skipped, validation))
        if last or is_checkpoint(step + 1, config) or save_now():
            snapshot = trainer.snapshot(step + 1)
            with trainer.averaged():
                save(snapshot, last)
        if last:
            wait_for_all(trainer.accelerator)  # every process returns after the adapter is written
            return step + 1
    return config.steps


def is_checkpoint(step: int, config: TrainConfig) -> bool:
    """Whether a checkpoint is due after `step` steps."""
    return step % config.checkpoints.every == 0 or step in config.checkpoints.milestones
