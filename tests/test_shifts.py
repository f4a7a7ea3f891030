"""Differences of biases and norms: read, attached at any weight, converted, fused."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from predictions import prediction
from rite_diffusion.adapters import Adapter, AdapterInfo, load_adapter, save_adapter
from rite_diffusion.adapters.attach import attach, detach, set_weight
from rite_diffusion.adapters.dialects import DIALECTS
from rite_diffusion.adapters.shifts import modules_of
from rite_diffusion.adapters.verify import verify_by_map
from rite_diffusion.api.convert import convert
from rite_diffusion.backbones.source import load_backbone
from rite_diffusion.errors import AdapterError, FusionError
from rite_diffusion.fusion.members import Member
from rite_diffusion.fusion.merge import merge
from rite_diffusion.fusion.settings import FusionSettings
from rite_diffusion.types import LoraPair, Shift

ATTENTION = "lora_unet_down_blocks_0_attentions_0"
VECTORS = {
    f"{ATTENTION}_norm": ("w_norm", "b_norm"),
    f"{ATTENTION}_transformer_blocks_0_norm2": ("w_norm",),
    f"{ATTENTION}_proj_out": ("diff_b",),
    f"{ATTENTION}_transformer_blocks_0_attn1_to_out_0": ("diff_b",),
    "lora_unet_mid_block_resnets_0_norm1": ("diff", "diff_b"),
    "lora_unet_conv_norm_out": ("w_norm", "b_norm"),
    "lora_te_text_model_encoder_layers_0_layer_norm1": ("w_norm", "b_norm"),
    "lora_te_text_model_encoder_layers_1_mlp_fc1": ("diff_b",),
}
PARAMETERS = {"w_norm": "weight", "diff": "weight", "b_norm": "bias", "diff_b": "bias"}


@pytest.fixture
def backbone(tiny_folder):
    return load_backbone(str(tiny_folder))


@pytest.fixture
def file(tmp_path, backbone):
    """Vectors of all sorts, and a LoRA on a layer whose bias moves too."""
    torch.manual_seed(0)
    known = modules_of(backbone)
    tensors = {
        f"{name}.{role}": 0.5 * torch.randn(len(getattr(known[name], PARAMETERS[role])))
        for name, roles in VECTORS.items()
        for role in roles
    }
    layer = f"{ATTENTION}_transformer_blocks_0_attn1_to_out_0"
    tensors[f"{layer}.lora_down.weight"] = torch.randn(2, 32)
    tensors[f"{layer}.lora_up.weight"] = torch.randn(32, 2)
    tensors[f"{layer}.alpha"] = torch.tensor(1)
    save_file(tensors, tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


def merged_by_hand(backbone, tensors, weight):
    """The tensors added to the base's own parameters."""
    known = modules_of(backbone)
    with torch.no_grad():
        for key, value in tensors.items():
            name, _, role = key.partition(".")
            if role in PARAMETERS:
                getattr(known[name], PARAMETERS[role]).add_(weight * value)
            elif role == "lora_up.weight":
                known[name].weight.add_(weight * 0.5 * value @ tensors[f"{name}.lora_down.weight"])


def test_attached_shifts_equal_a_manual_merge_at_every_weight(backbone, file):
    plain = prediction(backbone)
    attach(backbone, load_adapter(file), "a", 0.3)
    found = {}
    for weight in (-1.0, 0.0, 0.5, 2.0):
        set_weight(backbone, "a", weight)
        found[weight] = prediction(backbone)
    detach(backbone, "a")
    assert torch.equal(prediction(backbone), plain)
    torch.testing.assert_close(found[0.0], plain)
    before = 0.0
    for weight in (-1.0, 0.5, 2.0):
        merged_by_hand(backbone, load_file(file), weight - before)
        torch.testing.assert_close(found[weight], prediction(backbone), rtol=1e-3, atol=1e-4)
        assert (found[weight] - plain).abs().max() > 1e-2
        before = weight


def test_two_adapters_shifts_of_one_vector_add_up(backbone, file):
    plain = prediction(backbone)
    attach(backbone, load_adapter(file), "a", 0.5)
    half = prediction(backbone)
    attach(backbone, load_adapter(file), "b", 0.25)
    detach(backbone, "a")
    attach(backbone, load_adapter(file), "c", 0.25)
    torch.testing.assert_close(prediction(backbone), half, rtol=1e-4, atol=1e-4)
    with pytest.raises(AdapterError, match="attached already"):
        attach(backbone, load_adapter(file), "b")
    detach(backbone, "b")
    detach(backbone, "c")
    assert torch.equal(prediction(backbone), plain)
    assert not any("parametrizations" in name for name in backbone.components["unet"].state_dict())


def test_a_vector_that_the_model_lacks_changes_nothing(backbone, file):
    plain = prediction(backbone)
    for name in (f"{ATTENTION}_transformer_blocks_0_attn1_to_q", "lora_unet_nowhere"):
        adapter = Adapter([], AdapterInfo(), shifts=[Shift(name, "bias", torch.ones(32))])
        with pytest.raises(AdapterError, match="is not in"):
            attach(backbone, adapter, "a")
    assert torch.equal(prediction(backbone), plain)


@pytest.mark.parametrize("xl", [False, True])
def test_files_of_kohya_and_comfyui_keep_shifts(tmp_path, file, xl):
    adapter = load_adapter(file)
    if xl:  # told by its second text encoder
        second = "lora_te2_text_model_final_layer_norm"
        shifts = [*adapter.shifts, Shift(second, "bias", torch.ones(3))]
        adapter = Adapter(adapter.pairs, adapter.info, shifts=shifts)
    for target in ("kohya", "comfyui"):
        path = tmp_path / f"{target}.safetensors"
        DIALECTS[target].write(path, adapter)
        if not xl:
            assert verify_by_map(adapter, path, target).modules == 1
        found = {(s.name, s.parameter): s.values for s in load_adapter(path).shifts}
        assert len(found) == len(adapter.shifts)
        assert all(torch.equal(found[s.name, s.parameter], s.values) for s in adapter.shifts)
    keys = load_file(tmp_path / "comfyui.safetensors").keys()
    norm = "middle_block.0.in_layers.0"
    assert f"diffusion_model.{norm}.w_norm" in keys and f"diffusion_model.{norm}.b_norm" in keys
    save_adapter(tmp_path / "own.safetensors", adapter)
    assert len(load_adapter(tmp_path / "own.safetensors").shifts) == len(adapter.shifts)


@pytest.mark.parametrize("target", ["diffusers", "peft"])
def test_converting_shifts_to_dialects_without_names_for_them_is_refused(tmp_path, file, target):
    with pytest.raises(AdapterError, match="reads no differences of biases and norms.*kohya"):
        convert(file, target)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_fusing_adds_shifts_up_or_refuses(file):
    one = load_adapter(file)
    doubled = [Shift(s.name, s.parameter, 2 * s.values) for s in one.shifts[1:]]
    pairs = [LoraPair(p.name, p.down + 1, p.up, p.scale) for p in one.pairs]
    members = [
        Member(one, 0.5, file),
        Member(Adapter(pairs, AdapterInfo(), shifts=doubled), 2.0, file),
    ]
    fused = merge(members, "concat", FusionSettings())
    found = {(s.name, s.parameter): s.values for s in fused.shifts}
    for index, shift in enumerate(one.shifts):
        share = 0.5 if index == 0 else 0.5 + 2 * 2
        torch.testing.assert_close(found[shift.name, shift.parameter], share * shift.values)
    with pytest.raises(FusionError, match="'ties' cannot fuse: choose one of concat"):
        merge(members, "ties", FusionSettings())
    alone = merge(members[:1], "ties", FusionSettings())
    wanted = {(s.name, s.parameter): 0.5 * s.values for s in one.shifts}
    assert all(torch.equal(s.values, wanted[s.name, s.parameter]) for s in alone.shifts)
