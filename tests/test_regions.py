import numpy as np
import pytest
import torch

from random_adapters import random_adapter
from rite_diffusion.adapters.attach import attach
from rite_diffusion.backbones.protocols import Conditioning
from rite_diffusion.errors import ConfigError
from rite_diffusion.generation.attached import Attached
from rite_diffusion.generation.denoise import decode_pictures, denoising, sample
from rite_diffusion.generation.regional import (
    RegionalAttention,
    RegionPlan,
    concatenated_states,
    encode_parts,
    regional,
    regionally_guided,
)
from rite_diffusion.generation.regions import Region, adapter_weights, parse_region, region_shares
from shared_bases import shared_base

WHOLE = Region(0, 0, 1, 1, "a red cat")
LEFT, RIGHT = Region(0, 0, 0.5, 1, "a red cat"), Region(0.5, 0, 1, 1, "a blue dog")


def drawn(backbone, prompt, regions, seeds, adapters=()):
    """Pictures with regions, in three steps and away from the dark."""
    side = backbone.resolution
    predict = regionally_guided(
        backbone, prompt, regions, negative="dark", guidance=3.0, width=side, height=side,
        count=len(seeds), adapters=adapters,
    )  # fmt: skip
    *_, latents = denoising(backbone, predict, seeds, steps=3)
    return decode_pictures(backbone, latents)


# --- how they are written ----------------------------------------------------------------------


def test_a_region_survives_parsing_and_writing():
    region = parse_region("0, .25,0.5,1: a cat: red")
    assert region == Region(0, 0.25, 0.5, 1, "a cat: red")
    full = parse_region("0,0,1,1: a <cat> :: dark, blurry :: 1, -0.5")
    assert (full.prompt, full.negative, full.weights) == ("a <cat>", "dark, blurry", (1, -0.5))
    for each in (region, full, parse_region("0,0,1,1:a::::2")):
        assert parse_region(str(each)) == each


@pytest.mark.parametrize(
    ("text", "words"),
    [("a cat", "is not"), ("0,0,1: a cat", "is not"), ("0,0,1,nan: a cat", "is not"),
     ("0.5,0,0.5,1: a cat", "must hold"), ("0,0,1,2: a cat", "must hold"),
     ("0,0,1,1:", "is not"), ("0,0,1,__import__('os'): a cat", "is not"),
     ("0,0,1,1: a :: b :: x", "weights 'x'"), ("0,0,1,1: a :: b :: 99", "weights '99'"),
     ("0,0,1,1: a :: b :: 1 :: c", "is not")],
)  # fmt: skip
def test_invalid_region_texts_are_refused(text, words):
    with pytest.raises(ConfigError, match=words):
        parse_region(text)


# --- who rules where ---------------------------------------------------------------------------


def test_shares_sum_to_one_and_stay_inside_the_boxes():
    boxes = [Region(0, 0, 0.6, 1, "a"), Region(0.4, 0, 1, 0.5, "b")]
    shares = region_shares(boxes, 20, 20)
    torch.testing.assert_close(shares.sum(0), torch.ones(20, 20))
    assert shares[1, :, 12:].max() == 0 and shares[2, 10:].max() == 0
    assert torch.equal(shares[0, 10:, 12:], torch.ones(10, 8)) and shares[0, :, :12].max() == 0
    seam = shares[1, 4, 8:12]
    assert (seam.diff() < 0).all() and seam[0] > 0.9 and seam[-1] < 0.1


def test_region_shares_do_not_depend_on_the_order():
    boxes = [Region(0, 0, 0.7, 1, "a"), Region(0.3, 0, 1, 1, "b"), Region(0.2, 0.2, 0.8, 0.8, "c")]
    one, other = region_shares(boxes, 16, 24), region_shares(boxes[::-1], 16, 24)
    torch.testing.assert_close(other, one[[0, 3, 2, 1]])


def test_adapters_act_in_the_regions_that_call_them():
    boxes = [Region(0, 0, 0.5, 1, "a <cat>"), Region(0.5, 0, 1, 1, "a <dog>, big")]
    triggers = [["<cat>"], ["<dog>"], ["<style>"], []]
    rows = adapter_weights(boxes, "a park", triggers)
    assert rows == [[0, 0, 1, 1], [1, 0, 1, 1], [0, 1, 1, 1]]
    assert adapter_weights(boxes, "a <cat> in a park", triggers)[0] == [1, 0, 1, 1]
    assert adapter_weights([Region(0, 0, 1, 1, "masks")], "", [["sks"]]) == [[1], [1]]
    own = [Region(0, 0, 1, 1, "a <cat>", weights=(0.3,))]
    assert adapter_weights(own, "", [["<cat>"]]) == [[0], [0.3]]
    foreign = [Region(0, 0, 0.5, 1, "a cat", weights=(0.7, 0)), Region(0.5, 0, 1, 1, "a dog")]
    assert adapter_weights(foreign, "a park", [[], []]) == [[0, 1], [0.7, 0], [0, 1]]
    with pytest.raises(ConfigError, match="1 weights for 2 adapters"):
        adapter_weights(own, "", [["<cat>"], []])


# --- in the model ------------------------------------------------------------------------------


@pytest.mark.parametrize("seeds", [[7], [7, 8, 9]])
def test_one_region_over_the_whole_picture_equals_the_plain_picture(tiny, seeds):
    attach(tiny, random_adapter(tiny), "a", 0.8)
    adapters = [Attached("a", 0.8, ["cat"])]
    plain = sample(tiny, [WHOLE.prompt] * len(seeds), seeds, negative="dark", steps=3)
    ours = drawn(tiny, "something else", [WHOLE], seeds, adapters)
    for one, other in zip(plain, ours, strict=True):
        assert np.array_equal(np.asarray(one), np.asarray(other))


def test_one_region_over_the_whole_picture_equals_the_plain_picture_on_sdxl(tiny_folder_xl):
    backbone = shared_base(str(tiny_folder_xl))
    attach(backbone, random_adapter(backbone), "a", 0.8)
    plain = sample(backbone, [WHOLE.prompt], [7], negative="dark", steps=3)
    ours = drawn(backbone, WHOLE.prompt, [WHOLE], [7], [Attached("a", 0.8, ["cat"])])
    assert np.array_equal(np.asarray(plain[0]), np.asarray(ours[0]))


def test_layer_wise_and_shared_states_are_concatenated():
    shared, own = torch.randn(2, 3, 5), torch.randn(2, 4, 3, 5)
    joined = concatenated_states([shared, own])
    assert joined.shape == (2, 4, 6, 5) and torch.equal(joined[:, :, 3:], own)
    assert all(torch.equal(joined[:, layer, :3], shared) for layer in range(4))
    assert torch.equal(concatenated_states([shared, shared]), torch.cat([shared, shared], 1))


def test_drawing_with_regions_restores_the_model(tiny):
    attach(tiny, random_adapter(tiny), "a", 0.8)
    before = sample(tiny, ["a cat"], [1], steps=2)
    drawn(tiny, "a park", [LEFT, RIGHT], [1], [Attached("a", 0.8, ["cat"])])
    assert np.array_equal(
        np.asarray(before[0]), np.asarray(sample(tiny, ["a cat"], [1], steps=2)[0])
    )
    assert not any(isinstance(p, RegionalAttention) for p in tiny.unet.attn_processors.values())


def cross_attention_outputs(backbone, regions, adapters=(), prompt="a park"):
    """The first cross-attention's outputs (cells, C) as a map, of one fixed noisy picture."""
    factors = adapter_weights(regions, prompt, [a.triggers for a in adapters])
    texts = [(prompt, ""), *((region.prompt, "") for region in regions)]
    conditioning, lengths = encode_parts(backbone, texts, 1, adapters, factors)
    noisy = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    module = next(m for n, m in backbone.unet.named_modules() if n.endswith("attn2"))
    seen = []
    handle = module.register_forward_hook(lambda m, i, output: seen.append(output))
    with torch.no_grad(), regional(backbone, RegionPlan(regions, 8, 8, factors, lengths), adapters):
        backbone.denoise(noisy, torch.tensor([500, 500]), conditioning)
    handle.remove()
    return seen[0][1].reshape(8, 8, -1)


def test_a_region_changes_cross_attentions_only_inside_its_box(tiny):
    box = Region(0.25, 0.25, 0.75, 0.75, "a red cat")
    one = cross_attention_outputs(tiny, [box])
    other = cross_attention_outputs(tiny, [Region(0.25, 0.25, 0.75, 0.75, "two blue dogs")])
    differs = (one != other).any(-1)
    inside = torch.zeros(8, 8, dtype=torch.bool)
    inside[2:6, 2:6] = True
    assert torch.equal(differs, inside)


def test_an_adapters_residual_stays_in_its_region(tiny):
    attach(tiny, random_adapter(tiny), "a")
    acting = cross_attention_outputs(tiny, [LEFT, RIGHT], [Attached("a", 1.0, ["cat"])])
    silent = cross_attention_outputs(
        tiny,
        [LEFT, RIGHT],
        [Attached("a", 0.0, ["cat"])],
    )
    # the first self-attention has already let the halves look at each other, so the right one is
    # compared in the plan itself: its residuals are multiplied by zero
    assert not torch.equal(acting[:, :4], silent[:, :4])
    plan = RegionPlan([LEFT, RIGHT], 8, 8, adapter_weights([LEFT, RIGHT], "", [["cat"]]), [])
    loud = plan.factor_map(0, torch.zeros(2, 64, 5)).reshape(8, 8)
    assert loud[:, :4].eq(1).all() and loud[:, 4:].eq(0).all()
    assert torch.equal(plan.factor_map(0, torch.zeros(2, 5, 8, 8)), loud)
    assert plan.factor_map(0, torch.zeros(2, 5)) == pytest.approx(0.5)
    plan.branch = 2
    assert plan.factor_map(0, torch.zeros(2, 64, 5)) == 0


def test_the_order_of_regions_does_not_change_the_picture(tiny):
    boxes = [Region(0, 0, 0.6, 1, "a red cat"), Region(0.4, 0, 1, 1, "a blue dog")]
    one = drawn(tiny, "a park", boxes, [3])
    other = drawn(tiny, "a park", boxes[::-1], [3])
    assert np.abs(np.asarray(one[0], int) - np.asarray(other[0], int)).max() <= 2


def test_each_region_has_its_own_negative_prompt(tiny):
    plain = drawn(tiny, "a park", [LEFT], [3])
    own = [Region(0, 0, 0.5, 1, "a red cat", negative="a green house")]
    other = drawn(tiny, "a park", own, [3])
    assert not np.array_equal(np.asarray(plain[0]), np.asarray(other[0]))


def test_attention_grids_of_odd_sizes_are_recognised():
    plan = RegionPlan([LEFT], 9, 14, [[], []], [])
    assert plan.grid(9 * 14) == (9, 14)
    assert plan.grid(5 * 7) == (5, 7) and plan.grid(3 * 4) == (3, 4)
    assert plan.grid(77) == (0, 0)


def test_conditioning_holds_the_parts_side_by_side(tiny):
    texts = [("a park", ""), ("a cat", "dark")]
    made, lengths = encode_parts(tiny, texts, 2, [], [[], []])
    assert (
        isinstance(made, Conditioning)
        and lengths == [77, 77]
        and made.states.shape[:2] == (4, 2 * 77)
    )
    torch.testing.assert_close(made.states[3, 77:], tiny.encode_prompts(["a cat"]).states[0])
