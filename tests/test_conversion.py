"""Exports as other libraries load them, and what `rite convert` says of them."""

import json
import pickle

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from peft import PeftModel
from safetensors.torch import load_file, save_file

import rite_diffusion as rite
from predictions import prediction, prediction_of
from random_adapters import ATTENTION, LAYERS, varied_adapter
from rite_diffusion.adapters import Adapter, AdapterInfo, load_adapter, save_adapter
from rite_diffusion.adapters.attach import adaptable_layers, attach, base_weights, detach
from rite_diffusion.adapters.delta import adapted_weight
from rite_diffusion.adapters.dialects import DIALECTS
from rite_diffusion.adapters.dialects.published import load_published
from rite_diffusion.adapters.names import module_name
from rite_diffusion.adapters.rules import comfyui_map, kohya_map, published_layers, read_by_map
from rite_diffusion.adapters.verify import (
    attached_pairs,
    compare,
    verify_by_map,
    verify_in_diffusers,
)
from rite_diffusion.backbones.source import load_backbone
from rite_diffusion.errors import AdapterError
from rite_diffusion.types import LoraPair
from shared_bases import shared_base


def open_in_diffusers(folder):
    xl = "xl" in folder.name
    return (StableDiffusionXLPipeline if xl else StableDiffusionPipeline).from_pretrained(folder)


@pytest.mark.parametrize("layers", [ATTENTION, LAYERS], ids=["attention", "convolutions too"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_attached_equals_merged(tiny_folder, dora, layers):
    backbone = load_backbone(str(tiny_folder))
    adapter = varied_adapter(backbone, layers, dora)
    plain = prediction(backbone)
    attach(backbone, adapter, "a")
    attached = prediction(backbone)
    detach(backbone, "a")
    assert torch.equal(prediction(backbone), plain)
    weights = base_weights(backbone)
    for pair in adapter.pairs:
        weights[pair.name].copy_(adapted_weight(pair, weights[pair.name]))
    torch.testing.assert_close(attached, prediction(backbone), rtol=1e-3, atol=1e-4)
    assert (attached - plain).abs().max() > 1e-2


def test_a_file_may_mix_dora_and_lora(tiny_folder):
    backbone = load_backbone(str(tiny_folder))
    dora, plain = (varied_adapter(backbone, dora=kind).pairs for kind in (True, False))
    pairs = [
        one if i % 2 else other for i, (one, other) in enumerate(zip(dora, plain, strict=True))
    ]
    adapter = Adapter(pairs, AdapterInfo())
    attach(backbone, adapter, "a")
    attached = prediction(backbone)
    detach(backbone, "a")
    weights = base_weights(backbone)
    for pair in pairs:
        weights[pair.name].copy_(adapted_weight(pair, weights[pair.name]))
    torch.testing.assert_close(attached, prediction(backbone), rtol=1e-3, atol=1e-4)


@pytest.fixture(params=["tiny_folder", "tiny_folder_2", "tiny_folder_xl"])
def folder(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize(
    ("dialect", "dora"), [("kohya", False), ("diffusers", False), ("diffusers", True)]
)
def test_diffusers_loads_every_key(tmp_path, caplog, folder, dialect, dora):
    backbone = shared_base(str(folder))
    adapter = varied_adapter(backbone, LAYERS, dora)
    if dora:  # it drops DoRA norms in kohya's files and, whatever the file, in text encoders
        adapter = Adapter([p for p in adapter.pairs if "unet" in p.name], adapter.info)
    DIALECTS[dialect].write(tmp_path / "a.safetensors", adapter)
    pipeline = open_in_diffusers(folder)
    check = verify_in_diffusers(adapter, tmp_path / "a.safetensors", pipeline)
    assert check.modules == len(adapter.pairs)
    assert check.difference < 1e-6
    assert not [r for r in caplog.records if "unexpected" in r.message or "missing" in r.message]


def test_diffusers_predicts_the_same(tmp_path, folder):
    backbone = shared_base(str(folder))
    adapter = varied_adapter(backbone)
    pipeline = open_in_diffusers(folder)
    for dialect in ("kohya", "diffusers"):
        path = tmp_path / f"{dialect}.safetensors"
        DIALECTS[dialect].write(path, adapter)
        pipeline.load_lora_weights(str(tmp_path), weight_name=path.name, use_safetensors=True)
        theirs = prediction_of(pipeline)
        pipeline.unload_lora_weights()
        attach(backbone, adapter, "a")
        torch.testing.assert_close(theirs, prediction(backbone), rtol=1e-4, atol=1e-4)
        detach(backbone, "a")


def test_peft_loads_every_key_of_the_real_models(tmp_path, folder):
    backbone = shared_base(str(folder))
    adapter = varied_adapter(backbone, LAYERS)
    DIALECTS["peft"].write(tmp_path / "out", adapter)
    found = {}
    for component, model in backbone.components.items():
        loaded = PeftModel.from_pretrained(model, str(tmp_path / "out" / component))
        found |= attached_pairs({component: loaded.base_model.model})
    assert compare(adapter, found, "PEFT").modules == len(adapter.pairs)


@pytest.mark.parametrize("family", ["sd", "sdxl"])
@pytest.mark.parametrize("target", ["kohya", "comfyui"])
def test_no_key_of_a_whole_model_is_unmapped(tmp_path, target, family):
    torch.manual_seed(0)
    names = sorted(module_name(*layer) for layer in published_layers(family))
    pairs = [LoraPair(name, torch.randn(2, 3), torch.randn(4, 2), 0.7) for name in names]
    adapter = Adapter(pairs, AdapterInfo())
    DIALECTS[target].write(tmp_path / "a.safetensors", adapter)
    known = {"kohya": kohya_map, "comfyui": comfyui_map}[target](published_layers(family), family)
    read = read_by_map(load_file(tmp_path / "a.safetensors"), known)
    found, unmapped = read.pairs, read.skipped
    assert unmapped == [] and len(found) == len(names)
    check = verify_by_map(adapter, tmp_path / "a.safetensors", target)
    assert (check.modules, check.difference < 1e-6) == (len(names), True)


def test_comfyui_does_not_know_diffusers_attention():
    key = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors = {f"{key}.lora_A.weight": torch.ones(1, 1), f"{key}.lora_B.weight": torch.ones(1, 1)}
    read = read_by_map(tensors, comfyui_map(published_layers("sd"), "sd"))
    assert read.pairs == {} and read.skipped == sorted(tensors)


PROVEN = [(to, "tiny_folder") for to in DIALECTS] + [("kohya", "tiny_folder_xl")]


@pytest.mark.parametrize(("to", "model"), PROVEN)
def test_convert_checks_its_file_by_loading_it_back(tmp_path, to, model, request):
    folder = request.getfixturevalue(model)
    backbone = shared_base(str(folder))
    save_adapter(tmp_path / "a.safetensors", varied_adapter(backbone))
    suffix = "" if to == "peft" else ".safetensors"
    bare = rite.convert(tmp_path / "a.safetensors", to, tmp_path / f"bare{suffix}")
    assert [check.modules for check in bare.checks] == [len(bare.adapter.pairs)]
    assert bare.pixels is None
    proven = rite.convert(tmp_path / "a.safetensors", to, base=str(folder))
    assert proven.pixels <= 2
    assert all(check.difference < 1e-5 for check in proven.checks)
    readers = [check.reader for check in proven.checks]
    assert any("Pipeline" in reader for reader in readers) == (to in ("kohya", "diffusers"))
    assert proven.path == tmp_path / f"a-{to}{suffix}"


def test_converting_weights_that_diffusers_drops_is_refused(tmp_path, tiny_folder):
    adapter = varied_adapter(shared_base(str(tiny_folder)), dora=True)
    save_adapter(tmp_path / "a.safetensors", adapter)
    with pytest.raises(AdapterError, match="drops the DoRA norms of text encoders"):
        rite.convert(tmp_path / "a.safetensors", "diffusers")
    for to in ("peft", "kohya", "comfyui"):
        rite.convert(tmp_path / "a.safetensors", to)


def test_an_export_that_fails_its_check_is_deleted(tmp_path, tiny_folder, monkeypatch):
    backbone = shared_base(str(tiny_folder))
    save_adapter(tmp_path / "a.safetensors", varied_adapter(backbone))
    weak = DIALECTS["kohya"].write

    def forget_scale(path, adapter):
        pairs = [LoraPair(p.name, p.down, p.up, 1.0) for p in adapter.pairs]
        weak(path, Adapter(pairs, adapter.info))

    broken = type(DIALECTS["kohya"])(DIALECTS["kohya"].module_of, forget_scale)
    monkeypatch.setitem(DIALECTS, "kohya", broken)
    with pytest.raises(AdapterError, match="was not written"):
        rite.convert(tmp_path / "a.safetensors", "kohya", tmp_path / "b.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_pocket_adapters_are_not_converted_to_comfyui(tmp_path, pocket):
    save_adapter(tmp_path / "a.safetensors", varied_adapter(pocket))
    with pytest.raises(AdapterError, match="knows no layer for .* not laid out like"):
        rite.convert(tmp_path / "a.safetensors", "comfyui")
    export = rite.convert(tmp_path / "a.safetensors", "diffusers")
    assert len(export.checks) == 2 and export.pixels <= 2


class Canary:
    """Touches a file where a pickle of it is executed."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth", "a.pt"])
def test_reading_a_pickle_runs_no_code(tmp_path, name):
    (tmp_path / name).write_bytes(pickle.dumps({"params": Canary(tmp_path / "canary")}))
    torch.save({"params": Canary(tmp_path / "canary")}, tmp_path / f"zip-{name}")
    for path in (tmp_path / name, tmp_path / f"zip-{name}"):
        with pytest.raises(AdapterError, match="pickle"):
            load_adapter(path)
        named_as_one = path.suffix == ".safetensors"  # which is never opened as a pickle
        with pytest.raises(AdapterError, match="pickle" if named_as_one else "more than tensors"):
            load_published(path, None)
    assert not (tmp_path / "canary").exists()
    pickle.loads((tmp_path / name).read_bytes())
    assert (tmp_path / "canary").exists()  # the canary itself works


def test_mix_of_show_weights_convert_exactly(tmp_path, tiny_folder):
    torch.manual_seed(0)
    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    clip = "text_model.encoder.layers.0.self_attn.q_proj"
    unet = {
        f"{path}.lora_down.weight": torch.randn(4, 32),
        f"{path}.lora_up.weight": torch.randn(32, 4),
    }
    text = {
        f"{clip}.lora_down.weight": torch.randn(4, 64),
        f"{clip}.lora_up.weight": torch.randn(64, 4),
    }
    words = {"<a1>": torch.randn(16, 64), "<a2>": torch.randn(16, 64)}
    params = {"new_concept_embedding": words, "unet": unet, "text_encoder": text}
    torch.save({"params": params}, tmp_path / "potter.pth")
    adapter = load_published(tmp_path / "potter.pth", None)
    assert [pair.scale for pair in adapter.pairs] == [1.0, 1.0]
    assert {word: tuple(rows.shape) for word, rows in adapter.tokens.items()} == {
        "<a1>": (16, 1, 64), "<a2>": (16, 1, 64)
    }  # fmt: skip
    with pytest.raises(AdapterError, match="16 cross-attentions"):
        attach(shared_base(str(tiny_folder)), adapter, "a")
    with pytest.raises(AdapterError, match="<a1> are averaged.*--allow-loss"):
        rite.convert(tmp_path / "potter.pth", "kohya", published_pickle=True)
    export = rite.convert(tmp_path / "potter.pth", "kohya", published_pickle=True, allow_loss=True)
    assert sorted(p.name for p in export.embeddings) == ["a1.safetensors", "a2.safetensors"]
    first, second = export.lossy
    assert "<a1>" in first and "<a2>" in second
    rows = words["<a1>"]
    error = (rows - rows.mean(0)).norm() / rows.norm()
    assert export.lossy[first] == pytest.approx(float(error), rel=1e-5)
    mean = load_file(export.embeddings[0])["emb_params"]
    torch.testing.assert_close(mean, words["<a1>"].mean(0, keepdim=True))


def test_custom_diffusion_weights_need_their_base(tmp_path, tiny_folder):
    backbone = shared_base(str(tiny_folder))
    weights = base_weights(backbone)
    torch.manual_seed(0)
    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
    name = f"lora_unet_{path.replace('.', '_')}_to_k"
    change = 0.01 * torch.randn_like(weights[name])
    whole = {f"{path}.processor.to_k_custom_diffusion.weight": weights[name] + change}
    torch.save(whole | {"<new1>": torch.randn(64)}, tmp_path / "cat.bin")
    with pytest.raises(AdapterError, match="--base"):
        load_published(tmp_path / "cat.bin", None)
    [pair] = load_published(tmp_path / "cat.bin", weights).pairs
    assert pair.name == name and pair.rank == 32
    torch.testing.assert_close(pair.up @ pair.down, change, rtol=1e-3, atol=1e-5)


def test_an_adapter_of_another_base_is_refused_by_name(tmp_path, tiny_folder, tiny_folder_2):
    backbone = shared_base(str(tiny_folder))
    info = AdapterInfo(base="tiny-sd", base_fingerprint="0123456789abcdef")
    adapter = varied_adapter(backbone)
    save_adapter(tmp_path / "a.safetensors", Adapter(adapter.pairs, info))
    one = {"steps": 1, "width": 64, "height": 64, "base": str(tiny_folder)}
    with pytest.raises(AdapterError, match=f"'tiny-sd'.*{tiny_folder.name}.*--other-base"):
        rite.generate("x", adapters=[tmp_path / "a.safetensors"], **one)
    [image] = rite.generate("x", adapters=[tmp_path / "a.safetensors"], other_base=True, **one)
    assert np.asarray(image).std() > 0


@pytest.mark.parametrize(
    ("size", "words"),
    [(100_000_001, "header of 100,000,001 bytes; the format allows 100,000,000"),
     (100_000_200, "not a safetensors file, or it is cut off")],
)  # fmt: skip
def test_a_header_of_forbidden_size_is_refused_without_reading_it(tmp_path, size, words):
    path = tmp_path / "a.safetensors"
    with path.open("wb") as stream:
        stream.write(size.to_bytes(8, "little"))
        stream.seek(100_000_100)
        stream.write(b"\0")
    with pytest.raises(AdapterError, match=words):
        load_adapter(path)


def test_a_header_of_20_mb_is_read(tmp_path):
    tensors = {f"unet.conv_in.lora_{f}.weight": torch.ones(1, 1) for f in "AB"}
    save_file(tensors, tmp_path / "a.safetensors", {"ss_tag_frequency": "x" * 20_000_000})
    assert len(load_adapter(tmp_path / "a.safetensors").foreign["ss_tag_frequency"]) == 20_000_000


def test_a_refused_adapter_leaves_the_pipeline_as_it_was(tmp_path, tiny_folder):
    backbone = shared_base(str(tiny_folder))
    before = {n: part.state_dict() for n, part in backbone.components.items()}
    adapter = varied_adapter(backbone)
    stray = LoraPair(
        "lora_unet_mid_block_attentions_9_proj_in", torch.ones(1, 2), torch.ones(2, 1), 1
    )
    misfit = LoraPair(adapter.pairs[-1].name, torch.ones(1, 2), torch.ones(2, 1), 1)
    for bad in ([*adapter.pairs, stray], [*adapter.pairs[:-1], misfit]):
        with pytest.raises(AdapterError, match="another"):
            attach(backbone, Adapter(bad, adapter.info), "a")
    for name, part in backbone.components.items():
        assert part.state_dict().keys() == before[name].keys()
        assert all(torch.equal(v, before[name][k]) for k, v in part.state_dict().items())


def test_alpha_of_a_broken_configuration_is_refused(tmp_path):
    tensors = {f"unet.conv_in.lora_{f}.weight": torch.ones(1, 1) for f in "AB"}
    for stated, words in (
        ("{", "not JSON"),
        ("[]", "not a table"),
        ('{"unet.lora_alpha": "x"}', "'x'"),
    ):
        save_file(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": stated})
        with pytest.raises(AdapterError, match=words):
            load_adapter(tmp_path / "a.safetensors")
    pattern = {"unet.lora_alpha": 1, "unet.alpha_pattern": {"(a+)+$": 2}}
    save_file(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(pattern)})
    with pytest.raises(AdapterError, match="not a module's name"):
        load_adapter(tmp_path / "a.safetensors")


def test_adaptable_layers_are_keyed_by_the_module_names_of_files(tiny_folder):
    assert "lora_te_text_model_encoder_layers_0_self_attn_q_proj" in adaptable_layers(
        shared_base(str(tiny_folder))
    )
