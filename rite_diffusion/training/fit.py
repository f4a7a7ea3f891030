"""The settings of memory with which a training fits, and which of them costs least."""

from collections.abc import Iterator
from typing import Any

import torch

from rite_diffusion.backbones.memory import check_memory
from rite_diffusion.backbones.sizes import describe_bytes, system_memory
from rite_diffusion.config import TrainConfig
from rite_diffusion.config.memory import memory_conflict
from rite_diffusion.errors import ConfigError
from rite_diffusion.training.estimate import Estimates, Stage, can_be_estimated

SHARE = 0.9  # of the memory that a training may fill by its estimate

# From what costs least to what costs most: weights, offload, whether activations are recomputed.
# Recomputation costs time, int8 accuracy too, offloading most time and nf4 most accuracy.
LADDER = (
    ("full", "none", False),
    ("full", "none", True),
    ("int8", "none", False),
    ("int8", "none", True),
    ("full", "layers", True),
    ("int8", "layers", True),
    ("nf4", "none", True),
)


def room(device: torch.device) -> tuple[float, float]:
    """Bytes that a training may use: of the device, and of main memory."""
    main = SHARE * system_memory()
    if device.type != "cuda":
        return main, main
    return SHARE * torch.cuda.mem_get_info(device)[1], main


def fits(stages: list[Stage], device: torch.device) -> bool:
    """Whether every stage fits into the device and into main memory."""
    most, main = room(device)
    if device.type == "cuda":
        return all(each.bytes <= most and sum(each.main.values()) <= main for each in stages)
    return all(each.bytes + sum(each.main.values()) <= main for each in stages)


def settings_by_cost(config: TrainConfig, device: torch.device) -> Iterator[TrainConfig]:
    """The training with each of the settings of memory that it can have here, the cheapest first.

    What the training asks for stays: recomputation, and 8 bits for text encoders.
    """
    asked = config.memory
    for encoders in dict.fromkeys([asked.encoder_weights, "int8"]):
        for weights, offload, recomputed in LADDER:
            if recomputed < config.gradient_checkpointing:
                continue
            changed = {"weights": weights, "offload": offload, "encoder_weights": encoders}
            found = config.model_copy(
                update={
                    "memory": asked.model_copy(update=changed),
                    "gradient_checkpointing": recomputed,
                }
            )
            if _is_possible(found, device):
                yield found


def _is_possible(config: TrainConfig, device: torch.device) -> bool:
    if memory_conflict(config) or (device.type == "cpu" and config.memory.offload != "none"):
        return False
    try:
        check_memory(config.memory, config.base, device)
    except ConfigError:
        return False
    return True


def cheapest(estimates: Estimates, device: torch.device) -> TrainConfig | None:
    """The training with the cheapest settings of memory that fit; None where none do."""
    for config in settings_by_cost(estimates.config, device):
        if fits(estimates.stages(config), device):
            return config
    return None


def with_memory_that_fits(backbone: Any, config: TrainConfig, photos: int) -> TrainConfig:
    """The training with `memory.weights = auto` resolved; ConfigError where nothing fits."""
    if not can_be_estimated(config):
        raise ConfigError(
            f"memory.weights = auto: the memory of method {config.method} is not known before a "
            "step. Choose memory.weights = full, int8, fp8 or nf4, or method lora."
        )
    estimates = Estimates(backbone, config, photos)
    found = cheapest(estimates, backbone.device)
    if found is None:
        *_, least = settings_by_cost(config, backbone.device)
        worst = max(estimates.stages(least), key=lambda each: each.bytes)
        most, _ = room(backbone.device)
        raise ConfigError(
            f"memory.weights = auto: nothing fits into {most / 1e9:.1f} GB. With "
            f"{describe_settings(least)}, {worst.name} take {describe_bytes(worst.device)}. Lower "
            "resolution, batch or lora.rank, or choose a smaller base."
        )
    return found


def describe_settings(config: TrainConfig) -> str:
    """Settings of memory as they are written in a file."""
    memory = config.memory
    recomputed = str(config.gradient_checkpointing).lower()
    return (
        f"memory.weights = {memory.weights}, memory.encoder_weights = {memory.encoder_weights}, "
        f"memory.offload = {memory.offload}, gradient_checkpointing = {recomputed}"
    )
