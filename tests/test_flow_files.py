"""Adapter files of the flow families: in diffusers, by the names of the original code, and back."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from flow_bases import adapter_on, family
from flow_models import PIPELINES
from rite_diffusion.adapters import load_adapter, save_adapter
from rite_diffusion.adapters.delta import delta_weight
from rite_diffusion.adapters.dialects import DIALECTS
from rite_diffusion.adapters.flow_rules import original_place, read_original
from rite_diffusion.adapters.names import dotted, module_name
from rite_diffusion.adapters.verify import attached_pairs
from rite_diffusion.errors import AdapterError


def deltas(adapter):
    return {pair.name: delta_weight(pair) for pair in adapter.pairs}


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5)


@pytest.fixture(params=PIPELINES)
def base(request):
    return family(request.param)


def test_our_file_acts_alike_in_diffusers(base, tmp_path):
    adapter = adapter_on(base)
    save_adapter(tmp_path / "a.safetensors", adapter)
    pipeline = base.pipeline
    pipeline.load_lora_weights(tmp_path, weight_name="a.safetensors")
    found = attached_pairs({"transformer": pipeline.transformer})
    pipeline.unload_lora_weights()
    assert_same({name: delta_weight(pair) for name, pair in found.items()}, deltas(adapter))


def test_our_file_is_read_back(base, tmp_path):
    adapter = adapter_on(base)
    save_adapter(tmp_path / "a.safetensors", adapter)
    tensors = load_file(tmp_path / "a.safetensors")
    assert all(key.startswith("transformer.") and "alpha" not in key for key in tensors)
    read = load_adapter(tmp_path / "a.safetensors")
    assert_same(deltas(read), deltas(adapter))
    assert read.info.family == base.family and read.info.trigger == "<x>" and not read.notes


@pytest.mark.parametrize("target", ["kohya", "comfyui"])
def test_exports_by_the_original_names_act_alike(base, target, tmp_path):
    """By a map that is written in the other direction, and read back by our own reader."""
    adapter = adapter_on(base)
    DIALECTS[target].write(tmp_path / "a.safetensors", adapter)
    tensors = load_file(tmp_path / "a.safetensors")
    pairs = [(dotted(p.name.removeprefix("lora_transformer_")), p) for p in adapter.pairs]
    read = read_original(tensors, base.family, target, pairs)
    assert_same({module_name("transformer", path): value for path, value in read.items()},
                deltas(adapter))  # fmt: skip
    assert_same(deltas(load_adapter(tmp_path / "a.safetensors")), deltas(adapter))


@pytest.mark.parametrize("target", ["kohya", "comfyui"])
def test_ranks_come_back_from_a_block_diagonal_layer(target, tmp_path):
    adapter = adapter_on(family("flux"))
    DIALECTS[target].write(tmp_path / "a.safetensors", adapter)
    read = load_adapter(tmp_path / "a.safetensors")
    assert {p.name: p.rank for p in read.pairs} == {p.name: p.rank for p in adapter.pairs}


@pytest.mark.parametrize("stem", ["diffusion_model.{}", "lora_unet_{}", "base_model.model.{}"])
def test_a_dense_fused_layer_is_split_by_rows(base, stem, tmp_path):
    """As a trainer writes it that adapts the original layers: one down for all parts."""
    fused = {}
    for path in [path for path, _ in base.transformer.named_modules()]:
        found = original_place(base.family, path)
        if found is not None and path.startswith(base.block_prefixes):
            fused.setdefault(found[0], {})[found[1]] = path
    tensors, wanted = {}, {}
    for place, parts in fused.items():
        weights = [base.transformer.get_submodule(parts[i]).weight for i in sorted(parts)]
        down, up = torch.randn(2, weights[0].shape[1]), torch.randn(sum(map(len, weights)), 2)
        name = stem.format(place.replace(".", "_") if stem.startswith("lora_unet") else place)
        ends = ("lora_down", "lora_up") if stem.startswith("lora_unet") else ("lora_A", "lora_B")
        tensors[f"{name}.{ends[0]}.weight"], tensors[f"{name}.{ends[1]}.weight"] = down, up
        if stem.startswith("lora_unet"):
            tensors[f"{name}.alpha"] = torch.tensor(1.0)
        scale = 0.5 if stem.startswith("lora_unet") else 1.0
        for path, rows in zip((parts[i] for i in sorted(parts)),
                              up.split([len(each) for each in weights]), strict=True):  # fmt: skip
            wanted[module_name("transformer", path)] = rows @ down * scale
    save_file(tensors, tmp_path / "a.safetensors")
    read = load_adapter(tmp_path / "a.safetensors")
    same_names = {"chroma": "flux"}  # and sizes
    assert read.info.family == same_names.get(base.family, base.family)
    assert_same(deltas(read), wanted)


def test_files_without_a_stated_family_are_told_by_their_names(base, tmp_path):
    adapter = adapter_on(base, stated=False)
    save_adapter(tmp_path / "a.safetensors", adapter)
    read = load_adapter(tmp_path / "a.safetensors")
    assert read.info.family == ("flux" if base.family == "chroma" else base.family)


def test_diffusers_paths_of_other_trainers_are_read(base, tmp_path):
    """ai-toolkit's prefix, musubi's flat names, and alphas beside PEFT's suffixes."""
    adapter = adapter_on(base)
    dotted_names, flat, alphas = {}, {}, {}
    for pair in adapter.pairs:
        path = dotted(pair.name.removeprefix("lora_transformer_"))
        alpha = torch.tensor(pair.scale * pair.rank)
        dotted_names[f"diffusion_model.{path}.lora_A.weight"] = pair.down
        dotted_names[f"diffusion_model.{path}.lora_B.weight"] = pair.up * pair.scale
        stem = f"lora_unet_{path.replace('.', '_')}"
        flat |= {f"{stem}.lora_down.weight": pair.down, f"{stem}.lora_up.weight": pair.up,
                 f"{stem}.alpha": alpha}  # fmt: skip
        stem = f"transformer.{path}"
        alphas |= {f"{stem}.lora_A.weight": pair.down, f"{stem}.lora_B.weight": pair.up,
                   f"{stem}.alpha": alpha}  # fmt: skip
    for tensors in (dotted_names, flat, alphas):
        save_file(tensors, tmp_path / "a.safetensors")
        assert_same(deltas(load_adapter(tmp_path / "a.safetensors")), deltas(adapter))


def test_peft_folders_hold_the_transformer(base, tmp_path):
    adapter = adapter_on(base)
    DIALECTS["peft"].write(tmp_path / "a", adapter)
    assert (tmp_path / "a/transformer/adapter_config.json").is_file()
    assert_same(deltas(load_adapter(tmp_path / "a")), deltas(adapter))


def test_missing_parts_of_a_fused_layer_are_zero_rows(tmp_path):
    base = family("flux")
    paths = ["transformer_blocks.0.attn.to_k", "single_transformer_blocks.1.attn.to_v"]
    adapter = adapter_on(base, paths)
    DIALECTS["comfyui"].write(tmp_path / "a.safetensors", adapter)
    tensors = load_file(tmp_path / "a.safetensors")
    width = base.transformer.get_submodule(paths[0]).weight.shape[0]
    up = tensors["diffusion_model.double_blocks.0.img_attn.qkv.lora_B.weight"]
    assert up.shape[0] == 3 * width and not up[:width].any() and not up[2 * width :].any()
    with pytest.raises(AdapterError, match="too few of its parts"):
        only = adapter_on(family("lumina2"), ["layers.0.attn.to_q"])
        DIALECTS["comfyui"].write(tmp_path / "b.safetensors", only)


def test_norms_of_a_fused_dora_are_split_by_rows(tmp_path):
    width = 32
    norms = torch.rand(3 * width) + 0.5
    save_file(
        {
            "diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight": torch.randn(2, width),
            "diffusion_model.double_blocks.0.img_attn.qkv.lora_B.weight": torch.randn(96, 2),
            "diffusion_model.double_blocks.0.img_attn.qkv.dora_scale": norms[:, None],
        },
        tmp_path / "a.safetensors",
    )
    read = load_adapter(tmp_path / "a.safetensors")
    for pair, part in zip(sorted(read.pairs, key=lambda p: "qkv".index(p.name[-1])),
                          norms.split(width), strict=True):  # fmt: skip
        assert torch.equal(pair.magnitude, part)


def test_a_fused_layer_of_an_odd_size_is_refused(tmp_path):
    save_file(
        {
            "diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight": torch.randn(2, 32),
            "diffusion_model.double_blocks.0.img_attn.qkv.lora_B.weight": torch.randn(33, 2),
        },
        tmp_path / "a.safetensors",
    )
    with pytest.raises(AdapterError, match="33 output rows for 32 inputs"):
        load_adapter(tmp_path / "a.safetensors")


def test_the_header_states_scale_one_for_diffusers(tmp_path):
    adapter = adapter_on(family("z-image"))
    save_adapter(tmp_path / "a.safetensors", adapter)
    from rite_diffusion.adapters.storage import read_header

    stated = json.loads(read_header(tmp_path / "a.safetensors")["lora_adapter_metadata"])
    assert stated["transformer.r"] == stated["transformer.lora_alpha"]
    assert stated["transformer.rank_pattern"] == stated["transformer.alpha_pattern"]
