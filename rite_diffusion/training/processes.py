"""Several processes that train as one: each takes its share of every batch.

The adapter's gradients are small, so they are averaged in one message per step; the model itself is
not wrapped. `torchrun` and `accelerate launch` set the environment that tells the processes apart.
"""

import os

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from rite_diffusion.errors import RunError


def process_count() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this is the process that writes and prints."""
    return int(os.environ.get("RANK", "0")) == 0


@torch.no_grad()
def average_gradients(accelerator: Accelerator, parameters: list[nn.Parameter]) -> None:
    """Replace the gradient of all that trains now by its mean over the processes."""
    if accelerator.num_processes == 1:
        return
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    parts = _mean(accelerator, flat).split([gradient.numel() for gradient in gradients])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.grad = part.view_as(parameter).clone()


def mean_over_processes(accelerator: Accelerator, value: float) -> float:
    """The mean of a number over the processes."""
    if accelerator.num_processes == 1:
        return value
    tensor = torch.tensor(value, device=accelerator.device, dtype=torch.float32)
    return _mean(accelerator, tensor).item()


def _mean(accelerator: Accelerator, tensor: Tensor) -> Tensor:
    """The mean of a tensor over the processes; RunError where one of them does not answer."""
    try:
        return accelerator.reduce(tensor, "mean")  # pyright: ignore[reportReturnType]
    except RuntimeError as error:
        raise RunError(
            "another process of this run has died or hangs (its own messages say why). The newest "
            "checkpoint is whole: the same command goes on from it."
        ) from error
