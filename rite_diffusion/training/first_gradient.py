"""The start `lora.init = "lora_one"`: pairs along the gradient of a training's first batches."""

from functools import partial

from rite_diffusion.errors import ConfigError
from rite_diffusion.methods.init import follow_gradient
from rite_diffusion.methods.method import NAME
from rite_diffusion.training.configured import step_batch, step_loss
from rite_diffusion.training.job import Job
from rite_diffusion.training.precision import MixedPrecision
from rite_diffusion.training.processes import process_count

BATCHES = 8  # whose mean gradient is taken: those of the first steps


def start_pairs(job: Job) -> None:
    """Start the pairs of a new training where `lora.init` asks for the gradient.

    ConfigError where several processes train: each would have rounding of its own.
    """
    lora = job.config.lora
    if lora.init != "lora_one":
        return
    if process_count() > 1:
        raise ConfigError("lora.init = lora_one needs one process: start with gaussian or pissa.")
    follow_gradient(job.backbone, NAME, partial(_backward, job), lora.init_size)
    for parameter in job.method.parameters():
        parameter.grad = None


def _backward(job: Job) -> None:
    """Add up the gradients of the first batches' losses, in parts of `batch` pictures."""
    config = job.config
    precision = MixedPrecision(job.backbone.device, config.precision)
    for step in range(BATCHES):
        job.method.begin(step)
        batch = step_batch(job.backbone, job.data, config, step)
        for part in batch.parts(config.accumulate):
            with precision.autocast():
                loss = step_loss(job.backbone, job.method, part, config)
            loss.backward()
