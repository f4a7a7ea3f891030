"""Every setting of a PEFT folder that changes its tensors' meaning is honoured or refused."""

import copy
import json

import pytest
import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from rite_diffusion.adapters import Adapter, load_adapter
from rite_diffusion.adapters.delta import adapted_weight, relative_difference
from rite_diffusion.adapters.dialects.peft_settings import check_config
from rite_diffusion.adapters.names import module_name
from rite_diffusion.errors import AdapterError

ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
LAYERS = {
    f"{ATTENTION}.to_q": lambda: nn.Linear(24, 20),
    f"{ATTENTION}.to_out.0": lambda: nn.Linear(20, 24),
    "down_blocks.0.attentions.0.proj_in": lambda: nn.Conv2d(12, 10, 1),
    "mid_block.resnets.0.conv1": lambda: nn.Conv2d(12, 10, 3, padding=1),
    "conv_in": lambda: nn.Conv2d(4, 10, 3, padding=1),
}
LINEAR = [name for name in LAYERS if "attn1" in name]


def base_model() -> nn.Module:
    """Layers at paths of Stable Diffusion, the same weights every time."""
    torch.manual_seed(0)
    root = nn.Module()
    for path, make in LAYERS.items():
        *parents, leaf = path.split(".")
        module = root
        for name in parents:
            if name not in dict(module.named_children()):
                module.add_module(name, nn.Module())
            module = module.get_submodule(name)
        module.add_module(leaf, make())
    return root


def saved(folder, config):
    """A PEFT folder of a model whose adapter is random."""
    model = get_peft_model(base_model(), config)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("lora_", "hada_", "lokr_")):
            parameter.data = parameter.abs().data + torch.rand_like(parameter) / 2
    model.save_pretrained(str(folder))
    return folder


def updates_in_peft(folder) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """What PEFT's own reload adds to each layer's weight and bias."""
    base = base_model()
    merged = PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).merge_and_unload()
    return {
        module_name("unet", path): tuple(
            (getattr(merged.get_submodule(path), part) - getattr(layer, part)).detach()
            for part in ("weight", "bias")
        )
        for path in LAYERS
        for layer in [base.get_submodule(path)]
    }


def updates_here(adapter: Adapter) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    pairs = {pair.name: pair for pair in adapter.pairs}
    shifts = {shift.name: shift.values for shift in adapter.shifts}
    found = {}
    for path in LAYERS:
        layer, name = base_model().get_submodule(path), module_name("unet", path)
        weight = layer.weight.detach()
        change = adapted_weight(pairs[name], weight) - weight if name in pairs else 0 * weight
        found[name] = (change, shifts.get(name, torch.zeros_like(layer.bias)))
    return found


def assert_as_in_peft(folder, file=None):
    wanted, found = updates_in_peft(folder), updates_here(load_adapter(file or folder))
    assert any(weight.abs().max() > 0.1 for weight, _ in wanted.values())
    for name in wanted:
        for one, other in zip(found[name], wanted[name], strict=True):
            assert relative_difference(one, other) < 1e-4 or (one - other).abs().max() < 1e-5, name


HONOURED = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "lora_bias": {"lora_bias": True},
    "fan_in_fan_out": {"fan_in_fan_out": True, "target_modules": LINEAR},
    "rank_pattern": {"rank_pattern": {"to_q": 3, "mid_block.resnets.0.conv1": 2}},
    "alpha_pattern": {"alpha_pattern": {"to_q": 5, "attn1.to_out.0": 7, "conv1": 0.5}},
    "a pattern of the whole path": {"alpha_pattern": {"^conv_in": 5, "^conv1": 9}},
    "the first pattern counts": {"alpha_pattern": {"attn1.to_q": 5, "to_q": 7}},
    "rslora with patterns": {"use_rslora": True, "rank_pattern": {"to_q": 2},
                             "alpha_pattern": {"conv1": 3}},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal", "target_modules": LINEAR},
    "mica": {"init_lora_weights": "mica", "target_modules": LINEAR},
    "no init": {"init_lora_weights": False},
    "exclude_modules": {"exclude_modules": ["conv1"]},
    "dropout": {"lora_dropout": 0.5},
}  # fmt: skip


@pytest.mark.parametrize("setting", HONOURED)
def test_peft_settings_act_as_in_peft(tmp_path, setting):
    settings = {"r": 4, "lora_alpha": 6, "target_modules": list(LAYERS)} | HONOURED[setting]
    assert_as_in_peft(saved(tmp_path / "a", LoraConfig(**settings)))


@pytest.mark.parametrize("kind", [LoHaConfig, LoKrConfig])
@pytest.mark.parametrize("rank", [2, 12])
@pytest.mark.parametrize("effective", [False, True])
def test_peft_loha_and_lokr_are_read(tmp_path, kind, rank, effective):
    settings = {"r": rank, "alpha": 3, "target_modules": list(LAYERS)}
    settings |= {"use_effective_conv2d": effective, "alpha_pattern": {"to_q": 5}}
    assert_as_in_peft(saved(tmp_path / "a", kind(**settings)))


def test_a_peft_configuration_beside_a_file_is_used(tmp_path):
    config = LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=list(LAYERS))
    folder = saved(tmp_path / "a", config)
    assert_as_in_peft(folder, folder / "adapter_model.safetensors")
    renamed = (folder / "adapter_model.safetensors").rename(folder / "dog.safetensors")
    assert {pair.scale for pair in load_adapter(renamed).pairs} == {3.0}
    (folder / "adapter_config.json").unlink()
    assert "state no alpha" in load_adapter(renamed).notes[0]


def test_a_peft_folder_of_the_second_text_encoder_is_assigned_to_it(tmp_path):
    folder = tmp_path / "text_encoder_2"
    folder.mkdir()
    path = "base_model.model.text_model.encoder.layers.0.mlp.fc1"
    tensors = {f"{path}.lora_{factor}.weight": torch.randn(4, 4) for factor in "AB"}
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 2}))
    [pair] = load_adapter(folder).pairs
    assert (pair.name, pair.scale) == ("lora_te2_text_model_encoder_layers_0_mlp_fc1", 0.5)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_a_peft_init_that_changes_the_base_is_refused(tmp_path, init):
    config = LoraConfig(r=4, lora_alpha=6, init_lora_weights=init, target_modules=LINEAR)
    folder = saved(tmp_path / "a", config)
    with pytest.raises(AdapterError, match=f"init_lora_weights='{init}' changed the base"):
        load_adapter(folder)
    with pytest.raises(AdapterError, match=f"init_lora_weights='{init}' changed the base"):
        load_adapter(folder / "adapter_model.safetensors")
    wanted = updates_in_peft(folder)  # of the whole update, on the published base
    tensors = load_file(folder / "adapter_model.safetensors")
    for path in LINEAR:
        up, down = (tensors[f"base_model.model.{path}.lora_{each}.weight"] for each in "BA")
        right, _ = wanted[module_name("unet", path)]
        assert relative_difference(1.5 * up @ down, right) > 0.01


def test_pissa_adapters_converted_by_peft_are_read(tmp_path):
    config = LoraConfig(r=4, lora_alpha=6, init_lora_weights="pissa", target_modules=LINEAR)
    model = get_peft_model(base_model(), config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(str(tmp_path / "init"))
    model.peft_config["default"].init_lora_weights = "pissa"
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += torch.rand_like(parameter) / 2
    model.save_pretrained(
        str(tmp_path / "a"), path_initial_model_for_weight_conversion=str(tmp_path / "init")
    )
    assert_as_in_peft(tmp_path / "a")


REFUSED = {
    "init_lora_weights": ["corda", "loftq", "lora_ga", "something new", ["pissa"]],
    "bias": ["all", "lora_only"],
    "modules_to_save": [["conv_in"]],
    "target_parameters": [["attn1.to_q.weight"]],
    "trainable_token_indices": [[1, 2], {"token_embedding": [1]}],
    "layer_replication": [[[0, 2]]],
    "alora_invocation_tokens": [[1, 2]],
    "use_qalora": [True],
    "use_bdlora": [{"nblocks": 2}],
    "arrow_config": [{"top_k": 2}],
    "kasa_config": [{"beta": 1}],
    "monteclora_config": [{"num_samples": 2}],
    "a_setting_of_tomorrow": [True, 3],
}


@pytest.mark.parametrize("setting", REFUSED)
def test_unsupported_peft_settings_are_refused_by_name(tmp_path, setting):
    folder = saved(tmp_path / "a", LoraConfig(r=4, lora_alpha=6, target_modules=list(LAYERS)))
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    for value in REFUSED[setting]:
        path.write_text(json.dumps(config | {setting: value}))
        with pytest.raises(AdapterError, match=setting):
            load_adapter(folder)
        header = {f"unet.{k}": v for k, v in (config | {setting: value}).items()}
        save_file(
            {k.replace("base_model.model", "unet"): v for k, v in tensors.items()},
            tmp_path / "b.safetensors",
            {"lora_adapter_metadata": json.dumps(header)},
        )
        with pytest.raises(AdapterError, match=setting):
            load_adapter(tmp_path / "b.safetensors")


@pytest.mark.parametrize("kind", ["IA3", "OFT", "BOFT", "VERA", "ADALORA", "FOURIERFT"])
def test_peft_types_other_than_lora_are_refused_by_name(tmp_path, kind):
    folder = saved(tmp_path / "a", LoraConfig(r=4, target_modules=list(LAYERS)))
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": kind}))
    with pytest.raises(AdapterError, match=f"kind {kind}.*--base"):
        load_adapter(folder)


CONTRADICTIONS = {
    "has rank 8": {"r": 8},
    "has rank 3": {"rank_pattern": {"to_q": 3}},
    "use_dora=True": {"use_dora": True},
    "lora_bias=True": {"lora_bias": True},
    "is not a module's name": {"alpha_pattern": {"(a+)+$": 2}},
    "is not a table": {"alpha_pattern": [2]},
    "alpha of .* is 'two'": {"lora_alpha": "two"},
}


@pytest.mark.parametrize("words", CONTRADICTIONS)
def test_a_configuration_of_other_tensors_is_refused(tmp_path, words):
    folder = saved(tmp_path / "a", LoraConfig(r=4, lora_alpha=6, target_modules=list(LAYERS)))
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | CONTRADICTIONS[words]))
    with pytest.raises(AdapterError, match=words):
        load_adapter(folder)


@pytest.mark.parametrize("config", [LoraConfig, LoHaConfig, LoKrConfig])
def test_every_peft_setting_is_classified(config):
    """A setting that PEFT adds shows up here as refused, and gets its place."""
    settings = config(**({"r": 4} | {})).to_dict()
    check_config(settings | {"base_model_name_or_path": "x", "peft_version": "0.21"})
    harmless = {"task_type": "X", "revision": "main", "megatron_core": "m", "lora_dropout": 0.1}
    check_config(settings | harmless | {"exclude_modules": ["a"], "layers_to_transform": [1]})
