"""The settings of memory: how the base's weights are stored, and where."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from rite_diffusion.config.section import Section

if TYPE_CHECKING:
    from rite_diffusion.config.schema import TrainConfig

Storage = Literal["full", "int8", "fp8", "nf4"]
Weights = Literal["full", "int8", "fp8", "nf4", "auto"]
Offload = Literal["none", "layers", "model"]


class MemorySection(Section):
    """How the base's frozen weights are stored, so that a large one trains on a small device."""

    weights: Weights = Field(
        default="full",
        description="of the denoiser's linear layers; full: in `precision`; auto: with offload, "
        "encoder_weights and gradient_checkpointing, what costs least of all that fits",
    )
    encoder_weights: Storage = Field(
        default="full", description="of the text encoders' linear layers"
    )
    offload: Offload = Field(
        default="none",
        description="what waits in main memory until it is used: the denoiser's linear layers, or "
        "each model as a whole",
    )


def memory_conflict(config: TrainConfig) -> str:
    """Why a training cannot run with its settings of memory, and what to set; empty if it can."""
    memory, whole = config.memory, config.custom_diffusion.weights == "full"
    if memory.weights not in ("full", "auto") and config.method == "custom_diffusion" and whole:
        return (
            f"memory.weights = {memory.weights}: whole matrices train over full weights only. "
            "Set custom_diffusion.weights = lora"
        )
    stored = {memory.weights, memory.encoder_weights} - {"full", "auto"}
    reads = ["kind = dora"] * (config.lora.kind == "dora")
    reads += ["init = pissa"] * (config.lora.init == "pissa")
    if reads and (stored or memory.offload == "layers"):
        return (
            f"lora.{reads[0]} reads the base's weights: it needs memory.weights = full, "
            "memory.encoder_weights = full and no memory.offload = layers"
        )
    if memory.offload == "layers" and (config.compile or not config.gradient_checkpointing):
        return (
            "memory.offload = layers needs gradient_checkpointing = true, without which the "
            "backward pass holds all weights, and compile = false"
        )
    if memory.offload == "model" and (config.method != "lora" or config.lora.text_encoder):
        return (
            "memory.offload = model: text encoders leave the device before the backward pass, "
            "so they cannot train. Use method lora with lora.text_encoder = false"
        )
    return ""
