"""Training in several processes, each with its share of every batch.

The adapter's gradients are small, so they are averaged by one reduction per step, and the model is
not wrapped. `torchrun` and `accelerate launch` set the environment variables of each process.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from rite_diffusion.errors import RunError

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# Variables that accelerate also reads; those of MPI alone are not enough to train together.
OTHER_VARIABLES = (
    "LOCAL_WORLD_SIZE",
    *("PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    *(f"OMPI_COMM_WORLD_{key}" for key in ("SIZE", "RANK", "LOCAL_SIZE", "LOCAL_RANK")),
    *(f"MV2_COMM_WORLD_{key}" for key in ("SIZE", "RANK", "LOCAL_SIZE", "LOCAL_RANK")),
)


@dataclass(frozen=True)
class ProcessRank:
    """The rank of this process among those that train together."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0  # among the processes of this machine


def read_rank(environment: Mapping[str, str]) -> ProcessRank:
    """The rank that a launcher gave this process; rank 0 of 1 unless all its variables are set.

    RunError where they contradict each other.
    """
    variables = {name: environment.get(name, "") for name in LAUNCHER}
    if not all(variables.values()):
        return ProcessRank()
    numbers = [_whole_number(variables[name]) for name in LAUNCHER if name != "MASTER_ADDR"]
    rank, count, local_rank, port = numbers
    if not (0 <= rank < count and 0 <= local_rank < count and 0 <= port < 2**16):
        text = ", ".join(f"{name}={value}" for name, value in variables.items())
        raise RunError(
            f"the variables of a launcher contradict each other ({text}): start again with "
            "torchrun or accelerate launch, or unset them to train in one process."
        )
    return ProcessRank(rank, count, local_rank)


def _whole_number(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() else -1


def ignored_variables_note(environment: Mapping[str, str]) -> str:
    """A line about a launcher's variables that are ignored; empty where there are none."""
    if all(environment.get(name) for name in LAUNCHER):
        return ""
    named = [name for name in LAUNCHER if not name.startswith("MASTER")]
    names = [name for name in (*named, *OTHER_VARIABLES) if environment.get(name)]
    if not names:
        return ""
    missing = [name for name in LAUNCHER if not environment.get(name)]
    found = ", ".join(f"{name}={environment[name]}" for name in names)
    return f"one process: {found} ignored, as a launcher would set {', '.join(missing)} too"


def process_count() -> int:
    """The number of processes that train together."""
    return read_rank(os.environ).count


def is_main_process() -> bool:
    """Whether this process has rank 0, which writes and prints."""
    return read_rank(os.environ).rank == 0


def process_device(device: torch.device) -> torch.device:
    """The device of this process: of CUDA devices the one of its local rank."""
    if device.type != "cuda":
        return device
    return torch.device("cuda", read_rank(os.environ).local_rank)


def rendezvous_error(error: Exception) -> RunError:
    """The error of a run whose processes cannot connect to each other."""
    variables = ", ".join(f"{name}={os.environ.get(name, '')}" for name in LAUNCHER)
    [line, *_] = str(error).splitlines() or [""]
    return RunError(
        f"the processes of this run do not find each other ({variables}; {line}): start all of "
        "them, or unset these variables to train in one process."
    )


@contextmanager
def without_ignored_variables() -> Iterator[None]:
    """Remove ignored launcher variables from the environment until the block ends."""
    hidden: dict[str, str] = {}
    if not all(os.environ.get(name) for name in LAUNCHER):
        names = [name for name in (*LAUNCHER, *OTHER_VARIABLES) if name in os.environ]
        hidden = {name: os.environ.pop(name) for name in names}
    try:
        yield
    finally:
        os.environ.update(hidden)


def wait_for_all(accelerator: Accelerator) -> None:
    """Wait until every process calls this; RunError where one of them does not."""
    mean_over_processes(accelerator, 0.0)


@torch.no_grad()
def average_gradients(accelerator: Accelerator, parameters: list[nn.Parameter]) -> None:
    """Replace the gradients of trainable parameters by their means over the processes."""
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
    """The mean of a tensor over the processes; RunError where one of them fails."""
    try:
        return accelerator.reduce(tensor, "mean")  # pyright: ignore[reportReturnType]
    except RuntimeError as error:
        raise RunError(
            "another process of this run has died or hangs (its own messages say why). The newest "
            "checkpoint is whole: the same command goes on from it."
        ) from error
