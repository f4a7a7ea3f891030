"""Memory: how much a process has used, and what to do when there is none left."""

import sys

import psutil
import torch

from rite_diffusion.config import TrainConfig
from rite_diffusion.errors import RunError


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether memory ran out, a device's or the computer's own."""
    on_cpu = "DefaultCPUAllocator" in str(error)  # it has no exception type of its own
    return isinstance(error, torch.OutOfMemoryError) or on_cpu


def out_of_memory(config: TrainConfig) -> RunError:
    """What a run says that has no memory left, the settings that save most first."""
    remedies = []
    if not config.gradient_checkpointing:
        remedies.append("gradient_checkpointing = true")
    if config.batch > 1:
        remedies.append(f"batch = {config.batch // 2} with accumulate = {config.accumulate * 2}")
    if config.precision == "fp32":
        remedies.append("precision = bf16")
    remedies.append(f"a resolution below {config.resolution}")
    return RunError(
        f"out of memory in a step of {config.batch} pictures. Try {', or '.join(remedies)}. The "
        "newest checkpoint is whole: the same command goes on from it."
    )


def peak_memory(device: torch.device) -> int:
    """Most bytes that this process has used so far, on a CUDA device those of tensors there."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # POSIX only

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
