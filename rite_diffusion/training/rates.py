"""The course of the learning rates over a run."""

from collections.abc import Callable

import torch

from rite_diffusion.config import OptimSection, TrainConfig

WARMUP_SHARE = 5  # the warm-up takes at most one step of so many


def warmup_steps(optim: OptimSection, steps: int) -> int:
    """Steps of the warm-up in a course of so many: `optim.warmup`, or a fifth of them if fewer."""
    return min(optim.warmup, steps // WARMUP_SHARE)


def rate_factor(optim: OptimSection, steps: int) -> Callable[[int], float]:
    """Learning-rate factor of a step: linear warm-up, then constant, cosine or linear to zero.

    The step after the warm-up has the whole rate, and the decay begins there.
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


def describe_course(config: TrainConfig) -> str:
    """What the rates do over the run, as "warm-up 10 steps, then cosine to 0"."""
    first = config.tokens.first
    courses = [length for length in (first, config.steps - first) if length]
    told = []
    for length in dict.fromkeys(courses):
        steps, asked = warmup_steps(config.optim, length), config.optim.warmup
        cut = f" ({asked} asked: at most a fifth of {length})" if steps < asked else ""
        told.append(f"{steps}{cut}")
    decay = "constant" if config.optim.schedule == "constant" else f"{config.optim.schedule} to 0"
    return f"warm-up {' and '.join(told)} steps, then {decay}"
