"""Learning-rate schedules: warm-up and decay."""

from collections.abc import Callable

import torch

from rite_diffusion.config import OptimSection, TrainConfig

WARMUP_SHARE = 5  # the warm-up takes at most a fifth of the steps


def warmup_steps(optim: OptimSection, steps: int) -> int:
    """Warm-up steps in a schedule of `steps`: `optim.warmup`, but at most a fifth."""
    return min(optim.warmup, steps // WARMUP_SHARE)


def rate_factor(optim: OptimSection, steps: int) -> Callable[[int], float]:
    """Step -> learning-rate factor: linear warm-up, then constant, or cosine or linear to zero.

    The first step after the warm-up has factor 1, and the decay begins there.
    """
    decays = {
        "constant": lambda progress: 1.0,
        "linear": lambda progress: 1.0 - progress,
        "cosine": lambda progress: 0.5 + 0.5 * float(torch.cos(torch.tensor(torch.pi * progress))),
    }
    decay, warmup = decays[optim.schedule], warmup_steps(optim, steps)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return decay(min(1.0, (step - warmup) / (steps - warmup)))

    return factor


def describe_schedule(config: TrainConfig) -> str:
    """The schedule of the rates in words: "warm-up 10 steps, then cosine to 0"."""
    first = config.tokens.first
    phases = [length for length in (first, config.steps - first) if length]
    lengths = []
    for length in dict.fromkeys(phases):
        steps, asked = warmup_steps(config.optim, length), config.optim.warmup
        cut = f" ({asked} asked: at most a fifth of {length})" if steps < asked else ""
        lengths.append(f"{steps}{cut}")
    decay = "constant" if config.optim.schedule == "constant" else f"{config.optim.schedule} to 0"
    return f"warm-up {' and '.join(lengths)} steps, then {decay}"
