"""Random numbers that are functions of their keys, and the streams that keep their uses apart."""

from enum import IntEnum
from typing import TYPE_CHECKING

from rite_diffusion.errors import ConfigError

if TYPE_CHECKING:
    from torch import Generator

SEEDS = 2**64  # that torch's generators take, from 0


class Stream(IntEnum):
    """What a random number is for; equal seeds and steps give each use numbers of its own."""

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
    """ConfigError unless `count` seeds from this one on are what a generator takes."""
    if not isinstance(seed, int) or not 0 <= seed <= SEEDS - max(count, 1):
        raise ConfigError(
            f"seed {seed} is not a whole number from 0 to {SEEDS - max(count, 1)}: choose another."
        )


def generator(*keys: int) -> "Generator":
    """A CPU generator that is a function of its keys, such as (seed, step, stream)."""
    import numpy as np  # settings know the seeds' range without what this takes a second to import
    import torch

    state = np.random.SeedSequence(keys).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(state[0]) << 32 | int(state[1]))
