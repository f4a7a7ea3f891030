from dataclasses import replace

import numpy as np
import pytest
import torch

from random_adapters import random_adapter
from rite_diffusion.adapters.attach import attach, lora_layers, set_weight
from rite_diffusion.errors import ConfigError
from rite_diffusion.generation.attached import Attached
from rite_diffusion.generation.composition import COMPOSITIONS, PERIOD
from rite_diffusion.generation.denoise import guided
from rite_diffusion.generation.picture import picture, resolved
from rite_diffusion.generation.request import PictureRequest

ASKED = PictureRequest(prompt="a red cat", seed=3, steps=2, guidance=3.0)


@pytest.fixture
def two(tiny):
    """Two adapters in the tiny base."""
    for index in range(2):
        attach(tiny, random_adapter(tiny, seed=index), f"adapter_{index}", 0.5 + index)
    return [Attached("adapter_0", 0.5, ["<0>"]), Attached("adapter_1", 1.5, ["<1>"])]


def alone(backbone, adapters, index, latents, timestep):
    """The guided prediction with one adapter at its weight and all others at 0."""
    for place, each in enumerate(adapters):
        set_weight(backbone, each.name, each.weight * (place == index))
    found = guided(backbone, ["a cat"], "dark", 2.0)(latents, timestep)
    for each in adapters:
        set_weight(backbone, each.name, each.weight)
    return found


@torch.no_grad()
def test_switch_takes_turns_and_composite_is_the_mean_of_all(tiny, two):
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    timestep = torch.tensor(500)
    first, second = (alone(tiny, two, index, latents, timestep) for index in range(2))
    assert (first - second).abs().max() > 1e-3
    switch = COMPOSITIONS["switch"](tiny, "a cat", "dark", 2.0, two)
    turns = [switch(latents, timestep) for _ in range(2 * PERIOD + 1)]
    expected = [first] * PERIOD + [second] * PERIOD + [first]
    assert all(torch.equal(a, b) for a, b in zip(turns, expected, strict=True))
    composite = COMPOSITIONS["composite"](tiny, "a cat", "dark", 2.0, two)
    torch.testing.assert_close(composite(latents, timestep), (first + second) / 2)


@pytest.mark.parametrize("combine", COMPOSITIONS)
def test_one_adapter_composed_is_that_adapter(tiny, combine):
    attach(tiny, random_adapter(tiny), "adapter_0", 0.7)
    adapters = [Attached("adapter_0", 0.7, ["<t>"])]
    plain = picture(tiny, resolved(tiny, ASKED), adapters)
    ours = picture(tiny, resolved(tiny, replace(ASKED, combine=combine), adapters))
    assert np.array_equal(np.asarray(plain), np.asarray(ours))


@pytest.mark.parametrize("combine", COMPOSITIONS)
def test_without_adapters_there_is_nothing_to_compose(tiny, combine):
    plain = picture(tiny, resolved(tiny, ASKED))
    ours = picture(tiny, resolved(tiny, replace(ASKED, combine=combine)))
    assert np.array_equal(np.asarray(plain), np.asarray(ours))


@pytest.mark.parametrize("combine", COMPOSITIONS)
def test_weights_are_as_before_after_each_prediction(tiny, two, combine):
    def scales():
        return [
            layer.scaling[each.name]
            for each in two
            for layer in lora_layers(tiny, each.name).values()
        ]

    before = scales()
    picture(tiny, resolved(tiny, replace(ASKED, combine=combine)), two)
    assert scales() == before


def test_ways_that_cannot_be_are_refused(tiny):
    with pytest.raises(ConfigError, match="no way 'mix' to combine"):
        resolved(tiny, replace(ASKED, combine="mix"))
    with pytest.raises(ConfigError, match="regions have their own"):
        resolved(tiny, replace(ASKED, combine="switch", regions=["0,0,1,1: a cat"]))
