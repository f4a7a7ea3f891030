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
from rite_diffusion.generation.picture import draw_picture, resolve_request
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
def test_switch_alternates_adapters_and_composite_averages_them(tiny, two):
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
def test_composing_one_adapter_equals_attaching_it(tiny, combine):
    attach(tiny, random_adapter(tiny), "adapter_0", 0.7)
    adapters = [Attached("adapter_0", 0.7, ["<t>"])]
    plain = draw_picture(tiny, resolve_request(tiny, ASKED), adapters)
    ours = draw_picture(tiny, resolve_request(tiny, replace(ASKED, combine=combine), adapters))
    assert np.array_equal(np.asarray(plain), np.asarray(ours))


@pytest.mark.parametrize("combine", COMPOSITIONS)
def test_composing_no_adapters_equals_the_base(tiny, combine):
    plain = draw_picture(tiny, resolve_request(tiny, ASKED))
    ours = draw_picture(tiny, resolve_request(tiny, replace(ASKED, combine=combine)))
    assert np.array_equal(np.asarray(plain), np.asarray(ours))


@pytest.mark.parametrize("combine", COMPOSITIONS)
def test_composition_restores_adapter_weights_after_each_prediction(tiny, two, combine):
    def scales():
        return [
            layer.scaling[each.name]
            for each in two
            for layer in lora_layers(tiny, each.name).values()
        ]

    before = scales()
    draw_picture(tiny, resolve_request(tiny, replace(ASKED, combine=combine)), two)
    assert scales() == before


def test_unknown_and_conflicting_ways_to_combine_are_refused(tiny):
    with pytest.raises(ConfigError, match="no way 'mix' to combine"):
        resolve_request(tiny, replace(ASKED, combine="mix"))
    with pytest.raises(ConfigError, match="regions have their own"):
        resolve_request(tiny, replace(ASKED, combine="switch", regions=["0,0,1,1: a cat"]))
