"""Types that all packages share: concepts, photos, LoRA pairs, shifts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    import numpy as np
    from PIL.Image import Image
    from torch import Tensor


@dataclass(frozen=True)
class Concept:
    """What is learned: its trigger, and the noun of its class."""

    trigger: str
    class_noun: str


@dataclass(frozen=True)
class PhotoMeasures:
    """What a photo's report is made of; see `rite_diffusion.photos.measures`."""

    thumbnail: np.ndarray  # (48, 48, 3) uint8
    grey: np.ndarray  # (128, 128) uint8
    sharpness: float  # of the sharpest part, in [0, 1]
    frame: float  # depth of a plain frame as a share of the side; 0 without one


@dataclass(frozen=True)
class Photo:
    """A training picture with its caption; its pixels are read when they are needed."""

    path: Path
    size: tuple[int, int]  # width, height
    caption: str
    open: Callable[[], tuple[Image, Image | None]] = field(compare=False)  # picture and mask
    digest: str  # of the pixels
    measures: PhotoMeasures = field(compare=False)
    mask_digest: str = ""  # of the mask; empty if there is none
    white: float | None = None  # white share of the mask; None if there is no mask
    repeats: int = 1  # times per epoch
    weight: float = 1.0  # of its loss
    captioned: bool = False  # whether its caption came from a file

    @property
    def image(self) -> Image:
        """The picture (RGB, upright), read from its file."""
        return self.open()[0]

    @property
    def mask(self) -> Image | None:
        """The mask (of the picture's size, mode L, white: the subject), read from its file."""
        return self.open()[1]


@dataclass(frozen=True)
class LoraPair:
    """The LoRA factors of one layer: delta W = scale * up @ down (Hu et al. 2021).

    `down` is (rank, in) or (rank, in, k, k), `up` is (out, rank) or (out, rank, 1, 1). With a
    `magnitude` m (out,) the layer is a DoRA (Liu et al. 2024, Eq. 5): its adapted weight is
    m * (W + delta W) / |W + delta W|, norms taken over each output's weights.
    """

    name: str  # the module's name in adapter files: "lora_unet_mid_block_attentions_0_…_to_q"
    down: Tensor
    up: Tensor
    scale: float
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        """Number of rows of `down`."""
        return self.down.shape[0]


@dataclass(frozen=True)
class ProductUpdate:
    """A layer's update as a LoHa or LoKr (Yeh et al. 2024), by LyCORIS's names of its matrices.

    `hada_w1_a` (out, r), `hada_w1_b` (r, in * k * k) and the same of `w2`; or `lokr_w1` and
    `lokr_w2`, the latter whole or as `lokr_w2_a` and `lokr_w2_b`.
    """

    name: str  # the module's, as of a LoraPair
    parts: Mapping[str, Tensor]
    scale: float


@dataclass(frozen=True)
class Shift:
    """An adapter's update of a vector of a module: a bias, or a normalisation's weight."""

    name: str  # the module's, as of a LoraPair
    parameter: Literal["weight", "bias"]
    values: Tensor  # (out,)
