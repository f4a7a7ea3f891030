"""Regions in one forward pass of a transformer with joint attention of text and picture."""

import math

import pytest
import torch

from flow_bases import SIDE, adapter_on, family, latents_of, opened
from flow_models import with_random_weights, z_image
from rite_diffusion.adapters.attach import attach, detach
from rite_diffusion.backbones.protocols import JointAttention
from rite_diffusion.errors import ConfigError
from rite_diffusion.generation.attached import Attached
from rite_diffusion.generation.denoise import guided
from rite_diffusion.generation.joint_regions import JointPlan
from rite_diffusion.generation.picture import resolve_request
from rite_diffusion.generation.regional import regionally_guided
from rite_diffusion.generation.regions import Region, region_shares
from rite_diffusion.generation.request import PictureRequest

JOINT = ("z-image", "flux", "flux2", "chroma", "krea2")
WITHOUT = ("qwen-image", "sd3", "lumina2")  # attentions that take no mask
TIME = torch.tensor(700.0)
LEFT, RIGHT = Region(0, 0, 0.5, 1, "a red cat"), Region(0.5, 0, 1, 1, "a blue dog")


@pytest.fixture(params=JOINT)
def base(request):
    return family(request.param)


@pytest.fixture
def adapted(base):
    """The base with an adapter whose trigger is in LEFT's prompt; taken off again."""
    attach(base, adapter_on(base), "a", 0.02)
    yield base, [Attached("a", 0.02, ["cat"])]
    detach(base, "a")


def negative_of(base):
    return "dark" if base.guidance.kind == "classifier_free" else ""


def predictor(base, prompt, regions, adapters=(), by="attention"):
    return regionally_guided(
        base, prompt, regions, negative=negative_of(base), guidance=3.0, width=SIDE, height=SIDE,
        adapters=adapters, region_by=by,
    )  # fmt: skip


@torch.no_grad()
def test_one_region_over_the_whole_picture_equals_the_plain_picture(adapted):
    base, adapters = adapted
    latents = latents_of(base)
    whole = Region(0, 0, 1, 1, "a red cat")
    ours = predictor(base, "a red cat", [whole], adapters)(latents, TIME)  # pooled states are its
    plain = guided(base, ["a red cat"], negative_of(base), 3.0)(latents, TIME)
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


def first_joint_attention(base, predict, latents):
    """Outputs on the picture's tokens, as a map (B, h, w, C), of the first joint attention."""
    number = latents.shape[-1] // base.joint_attention.patch
    if base.family in ("flux", "chroma", "flux2"):
        module = base.transformer.transformer_blocks[0].attn
    else:
        blocks = getattr(base.transformer, "layers", None) or base.transformer.transformer_blocks
        module = getattr(blocks[0], "attention", None) or blocks[0].attn
    seen = []
    handle = module.register_forward_hook(lambda m, i, output: seen.append(output))
    with torch.no_grad():
        predict(latents, TIME)
    handle.remove()
    output = seen[0]
    tokens = output[0] if isinstance(output, tuple) else output
    if not isinstance(output, tuple):
        picture = number**2
        tokens = tokens[:, -picture:] if base.joint_attention.text_first else tokens[:, :picture]
    return tokens.unflatten(1, (number, number))


def test_a_region_reaches_other_cells_by_their_own_attention_alone(base):
    """In the first joint attention, a prompt changes the outputs of its own cells only."""
    box = Region(0.25, 0.25, 0.75, 0.75, "a red cat")
    other = Region(0.25, 0.25, 0.75, 0.75, "two dogs on the blue moon")
    latents = latents_of(base)
    pair = [
        first_joint_attention(base, predictor(base, "a park", [region]), latents)[-1]
        for region in (box, other)
    ]
    differs = (pair[0] - pair[1]).abs().amax(-1) > 1e-6 * pair[0].abs().max()
    number = len(differs)
    inside = region_shares([box], number, number)[1] > 0
    assert torch.equal(differs, inside)


@torch.no_grad()
def test_an_adapter_acts_in_its_regions_alone(adapted):
    """The factors of cells and of text tokens are those of the part that they belong to."""
    base, _ = adapted
    shares = region_shares([LEFT, RIGHT], 2, 4)
    layout = JointAttention(text_first=base.joint_attention.text_first, patch=2, multiple=4)
    plan = JointPlan(layout, shares, torch.tensor([[1, 2, 3]]), torch.tensor([[0.0], [1], [0.5]]))
    texts = torch.tensor([0, 1, 1, 0.5, 0.5, 0.5, 0.5, 0.5])  # two of padding at the end
    cells = torch.tensor([1, 1, 0.5, 0.5] * 2)
    order = (texts, cells) if layout.text_first else (cells, texts)
    assert torch.equal(plan.factor_map(0, 16, False)[0, :, 0], torch.cat(order))
    assert torch.equal(plan.factor_map(0, 8, True)[0, :, 0], texts)


@pytest.mark.parametrize("text_first", [True, False])
def test_the_bias_is_that_of_the_rule_written_out(text_first):
    shares = region_shares([Region(0, 0, 0.6, 1, "a"), Region(0.4, 0, 1, 1, "b")], 2, 3)
    lengths = torch.tensor([[2, 1, 1], [1, 3, 2]])
    plan = JointPlan(JointAttention(text_first, 2), shares, lengths, torch.zeros(3, 0))
    cells = shares.flatten(1)
    tokens = 6 + 6
    found = plan.bias(tokens, False)
    assert found is not None and found.shape == (2, 1, tokens, tokens)
    for row, counts in enumerate(lengths.tolist()):
        texts = [("text", part) for part, count in enumerate(counts) for _ in range(count)]
        picture = [("cell", cell) for cell in range(6)]
        line = texts + picture if text_first else picture + texts
        for i, (kind, one) in enumerate(line):
            for j, (other_kind, other) in enumerate(line):
                if kind == other_kind == "cell":
                    wanted = 0.0
                elif kind == other_kind:
                    wanted = 0.0 if one == other else -math.inf
                else:
                    part, cell = (one, other) if kind == "text" else (other, one)
                    share = cells[part, cell].item()
                    wanted = math.log(share) if share else -math.inf
                assert found[row, 0, i, j].item() == pytest.approx(wanted)


def test_pictures_of_regions_differ_from_mixed_ones_and_restore_the_model(adapted):
    base, adapters = adapted
    latents = latents_of(base)
    plain = guided(base, ["a cat"], negative_of(base), 3.0)
    with torch.no_grad():
        before = plain(latents, TIME)
        ways = [
            predictor(base, "a park", [LEFT, RIGHT], adapters, by)(latents, TIME)
            for by in ("attention", "predictions")
        ]
        after = plain(latents, TIME)
    assert not torch.allclose(*ways) and torch.equal(before, after)
    assert not any(module._forward_pre_hooks for module in base.transformer.modules())


def test_regions_at_different_lengths_of_prompt_and_negative_prompt():
    """Rows of unequal lengths, with padding, see what they see alone."""
    base = opened(with_random_weights(z_image()))
    whole = Region(0, 0, 1, 1, " ".join(["a cat on a blue background and"] * 6))
    latents = latents_of(base)
    with torch.no_grad():
        ours = predictor(base, "a park", [whole])(latents, TIME)
        plain = guided(base, [whole.prompt], "dark", 3.0)(latents, TIME)
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", WITHOUT)
def test_attentions_without_a_mask_are_refused(name):
    base = family(name)
    wish = PictureRequest(prompt="a", regions=["0,0,1,1: a cat"], region_by="attention")
    with pytest.raises(ConfigError, match="draws no regions by attention: choose predictions"):
        resolve_request(base, wish)
    with pytest.raises(ConfigError, match="no way 'mix' to draw regions"):
        PictureRequest(prompt="a", region_by="mix").check()
    with pytest.raises(ConfigError, match="no regions to draw by attention"):
        PictureRequest(prompt="a", region_by="attention").check()
