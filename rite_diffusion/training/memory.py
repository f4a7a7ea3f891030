"""Memory: its peak use, and errors when it runs out."""

import sys

import psutil
import torch

from rite_diffusion.config import TrainConfig
from rite_diffusion.errors import RunError


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says that memory ran out, on a device or in main memory."""
    on_cpu = "DefaultCPUAllocator" in str(error)  # torch raises no type of its own for it
    return isinstance(error, torch.OutOfMemoryError) or on_cpu


def out_of_memory_error(config: TrainConfig) -> RunError:
    """The error of a run without memory, with the settings that save most first."""
    remedies = []
    if not config.gradient_checkpointing:
        remedies.append("gradient_checkpointing = true")
    if config.batch > 1:
        remedies.append(f"batch = {config.batch // 2} with accumulate = {config.accumulate * 2}")
    if config.precision == "fp32":
        remedies.append("precision = bf16")
    if config.memory.weights == "full":
        remedies.append("memory.weights = int8")
    if config.memory.offload == "none" and torch.cuda.is_available():
        remedies.append("memory.offload = layers")
    remedies.append(f"a resolution below {config.resolution}")
    return RunError(
        f"out of memory in a step of {config.batch} pictures. Try {', or '.join(remedies)}. The "
        "newest checkpoint is whole: the same command goes on from it."
    )


def peak_memory(device: torch.device) -> int:
    """Peak memory of this process in bytes; on a CUDA device that of tensors."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # POSIX only

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
