"""Noise levels of a flow, shifted towards noise by the size of a picture.

sigma' = s sigma / (1 + (s - 1) sigma) (Esser et al. 2024, Sec. 5.3.2, Eq. 23), with s = exp(mu)
and mu linear in the number of a picture's tokens, or one s for all sizes.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rite_diffusion.backbones.protocols import Levels

TIMES = 1000  # what a flow's scheduler calls the noisiest level
LEAST = 1e-6  # sigma below which the signal-to-noise ratio grows no more

Shift = Callable[[int], float]  # tokens of a picture -> s


def scheduler_mu(config: Mapping[str, Any], tokens: int) -> float:
    """The mu that a scheduler's configuration has for a picture of so many tokens."""
    least, most = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    slope = (high - low) / (most - least)
    return tokens * slope + low - slope * least


def scheduler_shift(config: Mapping[str, Any], tokens: int) -> float:
    """The s that a scheduler's configuration has for a picture of so many tokens."""
    if config["use_dynamic_shifting"]:
        return math.exp(scheduler_mu(config, tokens))
    return config["shift"]


@dataclass(frozen=True)
class FlowSchedule:
    """x_t = (1 - sigma) x_0 + sigma noise at every sigma in [0, 1) (Liu et al. 2023)."""

    shift: Shift
    patch: int  # latent cells along the side of a token

    def levels(self, places: Tensor, cells: tuple[int, int], shift: float | None = None) -> Levels:
        """The levels at places (B,) in [0, 1), shifted by the base's own s or by `shift`."""
        tokens = (cells[0] // self.patch) * (cells[1] // self.patch)
        s = self.shift(tokens) if shift is None else shift
        sigma = s * places / (1 + (s - 1) * places)
        signal = 1 - sigma
        return Levels(signal, sigma, sigma * TIMES, (signal / sigma.clamp(min=LEAST)).square())
