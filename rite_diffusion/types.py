"""What every part of the toolkit shares: concepts, photos, LoRA pairs, biases, norms."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from PIL.Image import Image
    from torch import Tensor


@dataclass(frozen=True)
class Concept:
    """What is learned: the word that calls it and the kind of thing it is."""

    trigger: str
    class_noun: str


@dataclass(frozen=True)
class Photo:
    """One training picture with its caption. Its pixels stay in its file until they are needed."""

    path: Path
    size: tuple[int, int]  # width, height
    caption: str
    open: Callable[[], tuple[Image, Image | None]] = field(compare=False)  # picture and mask
    digest: str  # of the pixels
    likeness: int  # 64 bits, most of which near-duplicates share
    mask_digest: str = ""  # of the mask; empty: there is none
    white: float | None = None  # share of the mask that is white; None: there is no mask
    repeats: int = 1  # how often an epoch shows it
    weight: float = 1.0  # of its loss

    @property
    def image(self) -> Image:
        """The picture (RGB, upright), read from its file."""
        return self.open()[0]

    @property
    def mask(self) -> Image | None:
        """The mask (of the picture's size, mode L; white is learned), read from its file."""
        return self.open()[1]


@dataclass(frozen=True)
class LoraPair:
    """The factors of one adapted layer: delta W = scale * up @ down.

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
class Shift:
    """What an adapter adds to a vector of a module, at its weight: a bias, or a norm's weight."""

    name: str  # the module's, as a pair's
    parameter: Literal["weight", "bias"]
    values: Tensor  # (out,)
