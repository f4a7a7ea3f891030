"""DoRA at weights: w times the whole update m (W + D) / |W + D| - W, wherever something scales."""

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

import rite_diffusion as rite
from predictions import prediction
from random_adapters import LAYERS, varied_adapter
from rite_diffusion.adapters import Adapter, load_adapter, save_adapter
from rite_diffusion.adapters.attach import attach, base_weights, detach, read_pairs, set_weight
from rite_diffusion.adapters.delta import adapted_weight, delta_weight
from rite_diffusion.adapters.names import split_path
from rite_diffusion.backbones.source import load_backbone
from rite_diffusion.generation.attached import Attached
from rite_diffusion.generation.composition import composed, switched
from rite_diffusion.generation.denoise import guided
from rite_diffusion.generation.regional import regionally_guided
from rite_diffusion.generation.regions import Region
from rite_diffusion.types import LoraPair

PARTS = ("_mid_block_", "_text_model_encoder_layers_0_")
WEIGHTS = (-1.0, 0.0, 0.5, 1.0, 2.0)


@pytest.fixture(scope="module")
def tiny(tiny_folder):
    return load_backbone(str(tiny_folder))


@pytest.fixture(scope="module")
def loud(tiny):
    """A DoRA on linear layers and convolutions, with norms half as large again as the base's."""
    adapter = varied_adapter(tiny, LAYERS, dora=True)
    few = [pair for pair in adapter.pairs if any(part in pair.name for part in PARTS)]
    pairs = [replace(pair, magnitude=1.5 * pair.magnitude) for pair in few]
    return replace(adapter, pairs=pairs)


def scaled(adapter: Adapter, factor: float) -> Adapter:
    """Another DoRA."""
    pairs = [
        replace(p, down=factor * p.down, magnitude=factor * p.magnitude) for p in adapter.pairs
    ]
    return replace(adapter, pairs=pairs)


def literal(backbone, updates) -> torch.Tensor:
    """The prediction with w times each dense update added to the base's weights."""
    own = base_weights(backbone)
    kept = {name: weight.clone() for name, weight in own.items()}
    for adapter, factor in updates:
        for pair in adapter.pairs:
            weight = kept[pair.name].double()
            moved = weight + delta_weight(pair).double().reshape(weight.shape)
            rows = moved.flatten(1)
            whole = pair.magnitude.double()[:, None] * rows / rows.norm(dim=1, keepdim=True)
            own[pair.name].add_((factor * (whole.reshape(weight.shape) - weight)).float())
    found = prediction(backbone)
    for name, weight in kept.items():
        own[name].copy_(weight)
    return found


@pytest.mark.parametrize("weight", WEIGHTS)
def test_a_dora_weight_scales_the_whole_update(tiny, loud, weight):
    attach(tiny, loud, "a", weight)
    found = prediction(tiny)
    detach(tiny, "a")
    expected = literal(tiny, [(loud, weight)])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-4)
    if weight == 0:
        assert torch.equal(found, prediction(tiny))


def test_several_doras_add_up_their_updates(tiny, loud):
    other = scaled(loud, 0.6)
    attach(tiny, loud, "a", 0.5)
    attach(tiny, other, "b", -0.7)
    found = prediction(tiny)
    set_weight(tiny, "a", 0.0)
    alone = prediction(tiny)
    for name in ("a", "b"):
        detach(tiny, name)
    torch.testing.assert_close(
        found, literal(tiny, [(loud, 0.5), (other, -0.7)]), rtol=1e-3, atol=2e-4
    )
    torch.testing.assert_close(alone, literal(tiny, [(other, -0.7)]), rtol=1e-3, atol=2e-4)


def test_a_dora_at_weight_1_equals_pefts(tiny, loud):
    """Layer by layer, against PEFT's own DoRA with the same factors and norms."""
    attach(tiny, loud, "a")
    pairs = {pair.name: pair for pair in read_pairs(tiny, "a")}
    kinds = set()
    for original in loud.pairs:
        component, path = split_path(original.name)
        ours = tiny.components[component].get_submodule(path.removeprefix("text_model."))
        theirs = nn.Sequential(ours.base_layer)
        config = LoraConfig(
            r=original.rank, lora_alpha=original.scale * original.rank, target_modules=["0"],
            use_dora=True,
        )  # fmt: skip
        inject_adapter_in_model(config, theirs, "default")
        layer = theirs[0]
        with torch.no_grad():
            for holder, value in (
                (layer.lora_A, original.down),
                (layer.lora_B, original.up),
                (layer.lora_magnitude_vector, original.magnitude),
            ):
                weight = holder["default"].weight
                weight.copy_(value.reshape(weight.shape))
            kinds.add(type(ours.base_layer))
            wide = original.down.shape[1]
            inputs = torch.randn(2, wide, 6, 6) if original.down.ndim == 4 else torch.randn(2, wide)
            torch.testing.assert_close(ours(inputs), layer(inputs), rtol=1e-4, atol=1e-4)
        read = pairs[original.name]
        assert torch.equal(read.magnitude, original.magnitude) and read.scale == original.scale
    assert kinds == {nn.Linear, nn.Conv2d}
    detach(tiny, "a")


def test_a_dora_at_weight_half_acts_the_same_attached_and_fused(tmp_path, tiny_folder, tiny, loud):
    info = replace(loud.info, base=str(tiny_folder), base_fingerprint=tiny.fingerprint)
    save_adapter(tmp_path / "a.safetensors", replace(loud, info=info))
    item = f"{tmp_path / 'a.safetensors'}:0.5"
    out = rite.fuse(
        [item], method="weighted", base=str(tiny_folder), out=tmp_path / "f.safetensors"
    )
    attach(tiny, load_adapter(out), "fused")
    fused = prediction(tiny)
    detach(tiny, "fused")
    attach(tiny, load_adapter(tmp_path / "a.safetensors"), "a", 0.5)
    torch.testing.assert_close(prediction(tiny), fused, rtol=1e-3, atol=2e-4)
    detach(tiny, "a")


@torch.no_grad()
def test_switch_and_composite_use_one_dora_without_the_others(tiny, loud):
    other = scaled(loud, 0.6)
    attach(tiny, loud, "a", 0.5)
    attach(tiny, other, "b", 2.0)
    both = [Attached("a", 0.5, ["<a>"]), Attached("b", 2.0, ["<b>"])]
    latents, time = torch.randn(1, 4, 8, 8), torch.tensor(500)
    made = [how(tiny, "a cat", "", 2.0, both)(latents, time) for how in (switched, composed)]
    detach(tiny, "b")
    first = guided(tiny, ["a cat"], "", 2.0)(latents, time)
    detach(tiny, "a")
    attach(tiny, other, "b", 2.0)
    second = guided(tiny, ["a cat"], "", 2.0)(latents, time)
    detach(tiny, "b")
    for found, expected in zip(made, [first, (first + second) / 2], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("factor", [0.0, 0.5])
@torch.no_grad()
def test_a_region_scales_the_whole_dora_update(tiny, loud, factor):
    """One region over the whole picture is the picture with the adapter at that weight."""
    unet = [pair for pair in loud.pairs if pair.name.startswith("lora_unet")]
    adapter = replace(loud, pairs=unet)
    whole = Region(0, 0, 1, 1, "a cat", weights=(factor,))
    latents, time = torch.randn(1, 4, 8, 8), torch.tensor(500)
    attach(tiny, adapter, "a")
    attached = [Attached("a", 1.0, ["<a>"])]
    found = regionally_guided(
        tiny, "a cat", [whole], negative="", guidance=2.0, width=64, height=64, adapters=attached
    )(latents, time)
    set_weight(tiny, "a", factor)
    expected = guided(tiny, ["a cat"], "", 2.0)(latents, time)
    detach(tiny, "a")
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 3, 3)])
def test_a_dora_output_with_zero_weights_stays_finite(shape):
    """m 0 / |0| is no number; PEFT's and others' would be NaN from there on."""
    weight = torch.randn(shape)
    weight[2] = 0
    down, up = torch.randn(2, *shape[1:]), torch.randn(6, 2, *[1] * (len(shape) - 2))
    up[2] = 0
    pair = LoraPair("x", down, up, 1.0, torch.ones(6))
    assert torch.equal(adapted_weight(pair, weight)[2], weight[2])
