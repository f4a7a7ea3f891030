import pytest
import torch
from torch.nn import functional as F

from models import tiny_stable_diffusion_2
from reference.attention_penalty import KeepingAttention, literal_maps, literal_penalty
from rite_diffusion.adapters.attach import attach
from rite_diffusion.backbones.attention_maps import AttentionRecorder, grid_of
from rite_diffusion.backbones.source import load_backbone
from rite_diffusion.backbones.stable_diffusion import StableDiffusion
from rite_diffusion.methods.ed_lora import EdLora, attention_penalty
from wordy import PROMPT, random_words, tokens_adapter, wordy_config


def set_processors(backbone, processors):
    for module, processor in zip(backbone.cross_attentions, processors, strict=True):
        module.set_processor(processor)


@torch.no_grad()
@pytest.mark.parametrize("cells", [(16, 16), (8, 24)])
def test_attention_maps_equal_an_explicit_softmax(backbone, cells):
    attach(backbone, tokens_adapter(random_words(backbone, len(backbone.cross_attentions))), "a")
    recorder = AttentionRecorder(backbone.cross_attentions)
    noisy = torch.randn(3, backbone.latent_channels, *cells)
    timesteps = torch.tensor([500, 20, 900])
    conditioning = backbone.encode_prompts([PROMPT, "a cat", f"so {PROMPT}"])
    positions = [[2, 3], [4, 2]]
    backbone.denoise(noisy, timesteps, conditioning)
    found = recorder.maps([0, 2], positions, *cells)
    recorder.remove()
    usual = [module.processor for module in backbone.cross_attentions]
    processors = [KeepingAttention(number) for number in range(len(usual))]
    set_processors(backbone, processors)
    backbone.denoise(noisy, timesteps, conditioning)
    set_processors(backbone, usual)
    shapes = [tuple(each.shape[-2:]) for each in found]
    expected = literal_maps(processors, [0, 2], positions, shapes)
    assert len(shapes) > 1
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_recorder_leaves_the_attention_as_it_is():
    model = tiny_stable_diffusion_2
    backbone = StableDiffusion(model(), "tiny", torch.device("cpu"), "sdpa", model)
    noisy, timesteps = torch.randn(1, 4, 8, 8), torch.tensor([3])
    with torch.no_grad():
        states = backbone.encode_prompts(["a cat"])
        before = backbone.denoise(noisy, timesteps, states)
        recorder = AttentionRecorder(backbone.cross_attentions)
        assert torch.equal(backbone.denoise(noisy, timesteps, states), before)
        maps = recorder.maps([0], [list(range(77))], 8, 8)
    assert [tuple(each.shape[1:]) for each in maps] == [(77, side, side) for side in (8, 4, 2, 1)]
    for each in maps:  # every cell's attention is shared out
        torch.testing.assert_close(each.sum(1), torch.ones_like(each[:, 0]))
    recorder.remove()
    assert not any(layer._forward_hooks for layer in backbone.unet.modules())


def test_attention_maps_of_odd_sizes_have_rounded_up_sides():
    assert grid_of(9 * 5, 9, 5) == (9, 5) and grid_of(5 * 3, 9, 5) == (5, 3)
    assert grid_of(2 * 1, 9, 5) == (2, 1)
    with pytest.raises(ValueError, match="7 cells"):
        grid_of(7, 9, 5)


@pytest.mark.parametrize("subject", ["outside", "fit"])
@pytest.mark.parametrize("vectors", [1, 2, 3])
def test_the_attention_penalty_equals_a_literal_one(vectors, subject):
    torch.manual_seed(0)
    maps = torch.rand(4, vectors, 4, 6)
    masks = torch.zeros(4, 1, 8, 12)
    masks[0, :, :4, :5], masks[1, :, 2:3, 7:8], masks[2] = 1, 1, 1  # the last is left empty
    found = attention_penalty(maps, masks, subject)
    covered = F.avg_pool2d(masks, 2)[:, 0]
    expected = [literal_penalty(m, c, subject) for m, c in zip(maps, covered, strict=True)]
    assert found.tolist() == pytest.approx(expected, rel=1e-4)
    if subject == "outside":
        assert found[2] == 0


def after_a_pass(backbone, **settings):
    """An ED-LoRA that has seen one masked batch."""
    method = EdLora(backbone, wordy_config("ed_lora", **settings))
    captions = ["a <thing> on a red background", "a cat"]
    draws = torch.Generator().manual_seed(1)
    for pair in method.pairs():  # away from the start, where no gradient reaches `down`
        torch.nn.init.normal_(pair.up, std=0.1, generator=draws)
    noisy, masks = torch.randn(2, 8, 16, 16, generator=draws), torch.zeros(2, 1, 16, 16)
    masks[..., :8] = 1
    backbone.denoise(noisy, torch.tensor([500, 20]), method.conditioning(captions))
    return method, captions, masks


def penalty_gradients(checkpointing):
    """Gradients of the penalty alone by name."""
    backbone = load_backbone("pocket")
    backbone.checkpoint_gradients(checkpointing)
    method, captions, masks = after_a_pass(backbone)
    method.penalty(captions, masks).backward()
    return {n: p.grad for group in method.groups() for n, p in group["params"]}


def test_the_attention_penalty_has_gradients_with_and_without_checkpointing():
    gradients = penalty_gradients(checkpointing=False)
    assert gradients["tokens.0.<thing>"].abs().amax((1, 2)).min() > 0
    looking = [n for n in gradients if "attn2.to_q" in n or "attn2.to_k" in n]
    assert len(looking) == 28 and all(gradients[n].abs().max() > 0 for n in looking)
    again = penalty_gradients(checkpointing=True)
    for name in ("tokens.0.<thing>", *looking):
        torch.testing.assert_close(again[name], gradients[name], rtol=1e-3, atol=1e-8)


def test_the_attention_penalty_uses_only_captions_with_the_concept(pocket):
    method, captions, masks = after_a_pass(pocket, attention={"weight": 0.5})
    maps = method._recorder.maps([0], [[2, 3]], 16, 16)
    wanted = sum(attention_penalty(each, masks[:1], "outside") for each in maps) * 0.5
    assert method.penalty(captions, masks).item() == pytest.approx(wanted.item())
    assert method.penalty(["a cat", "a dog"], masks) == 0.0
    assert method.penalty(captions, None) == 0.0
