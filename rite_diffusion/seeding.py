"""Random numbers that are functions of their keys."""

import numpy as np
import torch


def generator(*keys: int) -> torch.Generator:
    """A CPU generator that is a function of its keys, such as (seed, step, stream)."""
    state = np.random.SeedSequence(keys).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(state[0]) << 32 | int(state[1]))
