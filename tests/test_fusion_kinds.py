from dataclasses import replace
from pathlib import Path

import pytest
import torch

import rite_diffusion as rite
from fusion_layers import SHAPES, dense, random_adapter, random_member, random_pair
from predictions import prediction
from random_adapters import random_adapter as random_backbone_adapter
from rite_diffusion.adapters import Adapter, load_adapter, save_adapter
from rite_diffusion.adapters.attach import attach, base_weights, detach
from rite_diffusion.adapters.delta import adapted_weight
from rite_diffusion.errors import FusionError
from rite_diffusion.fusion import FusionSettings
from rite_diffusion.fusion.dora import as_plain
from rite_diffusion.fusion.measure import measure
from rite_diffusion.fusion.members import Member, digest_of
from rite_diffusion.fusion.merge import merge
from rite_diffusion.fusion.statistics import Drawing
from shared_bases import shared_base

PLAIN = FusionSettings()
CONV, LINEAR = "lora_unet_mid_block_resnets_0_conv1", next(iter(SHAPES))


def dora(name: str, seed: int) -> tuple[Adapter, dict[str, torch.Tensor]]:
    """An adapter with a DoRA in one layer, and the base's weight there."""
    draws = torch.Generator().manual_seed(seed)
    weight = torch.randn(SHAPES[name], generator=draws)
    magnitude = torch.rand(len(weight), generator=draws) + 0.5
    pair = replace(random_pair(name, 2, 1.0, draws), magnitude=magnitude)
    return replace(random_adapter(seed), pairs=[pair]), {name: weight}


@pytest.mark.parametrize("name", SHAPES)
def test_a_dora_as_plain_lora_has_the_same_update(name):
    adapter, weights = dora(name, 0)
    [pair] = as_plain(adapter, weights).pairs
    assert pair.magnitude is None and pair.rank == min(pair.up.shape[0], pair.down[0].numel())
    torch.testing.assert_close(
        adapted_weight(pair, weights[name]), adapted_weight(adapter.pairs[0], weights[name])
    )


@pytest.mark.parametrize("method", ["concat", "weighted"])
def test_fusing_a_dora_and_a_lora_is_their_exact_sum(method):
    adapter, weights = dora(CONV, 0)
    plain = as_plain(adapter, weights)
    members = [Member(adapter, 0.5, Path("a"), plain=plain), random_member(1, names=(CONV, LINEAR))]
    fused = dense(merge(members, method, PLAIN))
    weight, [pair] = weights[CONV], adapter.pairs
    change = (adapted_weight(pair, weight) - weight).double().flatten(1)
    expected = 0.5 * change + dense(members[1].adapter)[CONV]
    torch.testing.assert_close(fused[CONV], expected, rtol=1e-5, atol=1e-5)
    cut = merge(members, "concat", FusionSettings(rank=4))
    assert max(cut.ranks()) == 4


def test_a_dora_without_its_base_is_refused():
    adapter, _ = dora(LINEAR, 0)
    with pytest.raises(FusionError, match="is a DoRA"):
        merge([Member(adapter, 1.0, Path("a")), random_member(1)], "concat", PLAIN)


def test_a_fused_dora_acts_as_the_dora_in_the_model(adapters, tiny_folder, tmp_path):
    backbone = shared_base(str(tiny_folder))
    weights = base_weights(backbone)
    plain = load_adapter(adapters[1])
    doras = [
        replace(pair, magnitude=1.1 * torch.linalg.norm(weights[pair.name].flatten(1), dim=1))
        for pair in plain.pairs
    ]
    save_adapter(tmp_path / "dora.safetensors", replace(plain, pairs=doras))
    only = rite.fuse(
        [tmp_path / "dora.safetensors"],
        base=str(tiny_folder),
        method="weighted",
        out=tmp_path / "f.safetensors",
    )
    fused = load_adapter(only)
    assert all(pair.magnitude is None for pair in fused.pairs)
    attach(backbone, load_adapter(tmp_path / "dora.safetensors"), "dora")
    expected = prediction(backbone)
    detach(backbone, "dora")
    attach(backbone, fused, "fused")
    torch.testing.assert_close(prediction(backbone), expected, rtol=1e-3, atol=1e-3)


def test_a_dora_is_fused_by_gram_beside_a_lora(adapters, tiny_folder, tmp_path):
    backbone = shared_base(str(tiny_folder))
    weights = base_weights(backbone)
    plain = load_adapter(adapters[1])
    doras = [
        replace(pair, magnitude=torch.linalg.norm(weights[pair.name].flatten(1), dim=1))
        for pair in plain.pairs
    ]
    save_adapter(tmp_path / "dora.safetensors", replace(plain, pairs=doras))
    out = rite.fuse(
        [adapters[0], tmp_path / "dora.safetensors"],
        base=str(tiny_folder),
        drawing=Drawing(steps=1),
        rank=6,
        allow_loss=True,
        out=tmp_path / "f.safetensors",
    )
    fused = load_adapter(out)
    assert max(fused.ranks()) <= 6 and fused.names() == sorted(plain.names())


def test_adapters_of_sdxl_are_fused(tiny_folder_xl, tmp_path):
    backbone = shared_base(str(tiny_folder_xl))
    members = []
    for seed in range(2):
        adapter = random_backbone_adapter(backbone, seed=seed)
        info = replace(adapter.info, trigger=f"<{seed}>", base_fingerprint=backbone.fingerprint)
        members.append(Member(replace(adapter, info=info), 1.0, Path(f"{seed}")))
    prompts = [[f"a <{seed}>"] for seed in range(2)]
    sketches = measure(backbone, [m.adapter for m in members], prompts, Drawing(steps=1))
    fused = merge(
        [replace(m, sketch=s) for m, s in zip(members, sketches, strict=True)], "gram", PLAIN
    )
    assert any(name.startswith("lora_te2_") for name in fused.names())
    save_adapter(tmp_path / "f.safetensors", fused)
    before = prediction(backbone, 8)
    attach(backbone, load_adapter(tmp_path / "f.safetensors"), "fused")
    after = prediction(backbone, 8)
    assert (after - before).abs().max() > 1e-2 and bool(after.isfinite().all())


# --- tokens and names --------------------------------------------------------------------------


def with_tokens(adapter: Adapter, word: str, layers: int, seed: int) -> Adapter:
    rows = torch.randn(layers, 2, 8, generator=torch.Generator().manual_seed(seed))
    return replace(adapter, tokens={word: rows})


def test_embeddings_of_all_adapters_are_in_the_fused_file(tmp_path):
    one, two = (
        with_tokens(random_adapter(0), "<0>", 16, 0),
        with_tokens(random_adapter(1), "<1>", 1, 1),
    )
    fused = merge([Member(one, 0.5, Path("a")), Member(two, 1.0, Path("b"))], "concat", PLAIN)
    save_adapter(tmp_path / "f.safetensors", fused)
    again = load_adapter(tmp_path / "f.safetensors")
    assert again.tokens.keys() == {"<0>", "<1>"}
    for word, rows in (one.tokens | two.tokens).items():
        assert torch.equal(again.tokens[word], rows)


def test_adapters_that_differ_in_tokens_or_magnitudes_alone_are_not_the_same():
    plain = random_adapter(0)
    words = [with_tokens(plain, "<0>", 1, seed) for seed in range(2)]
    pairs = [replace(pair, magnitude=torch.ones(len(pair.up))) for pair in plain.pairs]
    each = [plain, *words, replace(plain, pairs=pairs)]
    assert len({digest_of(adapter) for adapter in each}) == 4


def test_adapters_of_several_concepts_with_a_shared_trigger_are_refused():
    both = random_adapter(0)
    both = replace(both, info=replace(both.info, trigger="<cat>, <dog>", class_noun="cat, dog"))
    other = random_adapter(1)
    other = replace(other, info=replace(other.info, trigger="<dog>"))
    with pytest.raises(FusionError, match="both have the trigger '<dog>'"):
        merge([Member(both, 1.0, Path("a")), Member(other, 1.0, Path("b"))], "concat", PLAIN)


def test_a_1x1_convolution_and_a_matrix_of_one_layer_are_fused():
    name = "lora_unet_down_blocks_0_attentions_0_proj_in"
    one, two = random_adapter(0, names=(name,)), random_adapter(1, names=(name,))
    flat = [replace(p, up=p.up.flatten(1), down=p.down.flatten(1)) for p in two.pairs]
    members = [Member(one, 1.0, Path("a")), Member(replace(two, pairs=flat), 1.0, Path("b"))]
    [pair] = merge(members, "concat", PLAIN).pairs
    assert pair.down.shape == (6, 14, 1, 1) and pair.up.shape == (10, 6, 1, 1)
    torch.testing.assert_close(
        dense(Adapter([pair], one.info))[name], dense(one)[name] + dense(two)[name]
    )
