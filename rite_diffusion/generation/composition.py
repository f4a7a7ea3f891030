"""Several adapters in one picture without merging them (Zhong et al. 2024, arXiv 2402.16843).

    sum        all adapters at once, their updates added up
    switch     one adapter at a time, in order, each for a few steps
    composite  in every step the mean of the predictions with each adapter alone

`composite` takes as many predictions per step as there are adapters; the others take one.
"""

from collections.abc import Sequence
from itertools import count

import torch
from torch import Tensor

from rite_diffusion.backbones.protocols import Backbone
from rite_diffusion.generation.attached import Attached, scaled_by
from rite_diffusion.generation.denoise import Predict, guided

PERIOD = 5  # steps per turn of an adapter with `switch`, as in the paper


def switched(
    backbone: Backbone,
    prompt: str,
    negative: str,
    guidance: float,
    adapters: Sequence[Attached],
) -> Predict:
    """LoRA Switch: a predictor that uses one adapter after the other, PERIOD steps each."""
    each = _each_alone(backbone, prompt, negative, guidance, adapters)
    steps = count()
    return lambda latents, timestep: each[next(steps) // PERIOD % len(each)](latents, timestep)


def composed(
    backbone: Backbone,
    prompt: str,
    negative: str,
    guidance: float,
    adapters: Sequence[Attached],
) -> Predict:
    """LoRA Composite: a predictor of the mean of the predictions with each adapter alone."""
    each = _each_alone(backbone, prompt, negative, guidance, adapters)

    def predict(latents: Tensor, timestep: Tensor) -> Tensor:
        return torch.stack([alone(latents, timestep) for alone in each]).mean(0)

    return predict


def _each_alone(
    backbone: Backbone,
    prompt: str,
    negative: str,
    guidance: float,
    adapters: Sequence[Attached],
) -> list[Predict]:
    """A predictor with each adapter alone, in the text encoder too; of the base if there are none.

    Adapters are scaled only during each prediction.
    """
    rows = torch.eye(len(adapters)).tolist() or [[]]
    return [_scaled_prediction(backbone, prompt, negative, guidance, adapters, row) for row in rows]


def _scaled_prediction(
    backbone: Backbone,
    prompt: str,
    negative: str,
    guidance: float,
    adapters: Sequence[Attached],
    factors: list[float],
) -> Predict:
    with scaled_by(backbone, adapters, factors):
        plain = guided(backbone, [prompt], negative, guidance)

    def predict(latents: Tensor, timestep: Tensor) -> Tensor:
        with scaled_by(backbone, adapters, factors):
            return plain(latents, timestep)

    return predict


COMPOSITIONS = {"switch": switched, "composite": composed}
SUM = "sum"
