"""The settings of memory: how the base's weights are stored, and where."""

from typing import Literal

from pydantic import Field

from rite_diffusion.config.section import Section

Storage = Literal["full", "int8", "fp8", "nf4"]
Offload = Literal["none", "layers", "model"]


class MemorySection(Section):
    """How the base's frozen weights are stored, so that a large one trains on a small device."""

    weights: Storage = Field(
        default="full", description="of the denoiser's linear layers; full: in `precision`"
    )
    encoder_weights: Storage = Field(
        default="full", description="of the text encoders' linear layers"
    )
    offload: Offload = Field(
        default="none",
        description="what waits in main memory until it is used: the denoiser's linear layers, or "
        "each model as a whole",
    )
