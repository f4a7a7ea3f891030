"""Random number generators that are functions of keys, and the streams for different uses."""

from enum import IntEnum
from typing import TYPE_CHECKING

from rite_diffusion.errors import ConfigError

if TYPE_CHECKING:
    from torch import Generator

SEEDS = 2**64  # number of seeds, from 0, that torch's generators take


class Stream(IntEnum):
    """The use of random numbers; each use has independent numbers for the same seed and step."""

    ORDER = 0  # of the samples in an epoch
    NOISE = 1
    TIMESTEPS = 2
    CAPTION_DROPOUT = 3
    NOISE_OFFSET = 4
    INPUT_PERTURBATION = 5
    BUCKETS = 6
    VIEWS = 7
    CAPTION_SHUFFLE = 8
    HELD_OUT = 9
    NEW_EMBEDDINGS = 10


def check_seed(seed: int, count: int = 1) -> None:
    """ConfigError unless `count` consecutive seeds from this one are valid."""
    if not isinstance(seed, int) or not 0 <= seed <= SEEDS - max(count, 1):
        raise ConfigError(
            f"seed {seed} is not a whole number from 0 to {SEEDS - max(count, 1)}: choose another."
        )


def generator(*keys: int) -> "Generator":
    """A CPU generator that is a function of its keys, such as (seed, step, stream)."""
    import numpy as np  # here, as importing it takes a second that checks of settings do not need
    import torch

    state = np.random.SeedSequence(keys).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(state[0]) << 32 | int(state[1]))
