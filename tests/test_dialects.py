"""Every dialect means the same delta W, and other people's files are read for what they are."""

import json
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from random_adapters import BLOCK, mixed_adapter, pair
from rite_diffusion.adapters import Adapter, AdapterInfo, load_adapter, save_adapter
from rite_diffusion.adapters.delta import delta_weight, relative_difference
from rite_diffusion.adapters.dialects import DIALECTS, embeddings, locate, peft
from rite_diffusion.adapters.names import from_sgm, module_name, to_sgm
from rite_diffusion.adapters.rules import published_layers, sgm_paths
from rite_diffusion.errors import AdapterError


def assert_same(found: Adapter, wanted: Adapter, tolerance=1e-6):
    assert found.names() == wanted.names()
    for one, other in zip(found.pairs, wanted.pairs, strict=True):
        assert relative_difference(delta_weight(one), delta_weight(other)) <= tolerance, one.name
        assert (one.magnitude is None) == (other.magnitude is None)
        if one.magnitude is not None:
            assert torch.equal(one.magnitude, other.magnitude)


def target(folder, dialect):
    return folder / (dialect if dialect == "peft" else f"{dialect}.safetensors")


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("sdxl", [False, True], ids=["sd", "sdxl"])
@pytest.mark.parametrize("second", DIALECTS)
@pytest.mark.parametrize("first", DIALECTS)
def test_a_chain_of_two_dialects_keeps_delta_w(tmp_path, first, second, sdxl, dora):
    original = mixed_adapter(sdxl, dora)
    path = target(tmp_path, first)
    DIALECTS[first].write(path, original)
    read = load_adapter(path)
    assert read.dialect.startswith(first) and not read.notes
    again = target(tmp_path / "again", second)
    again.parent.mkdir()
    DIALECTS[second].write(again, read)
    assert_same(load_adapter(again), original)


def test_dialects_are_named_as_their_tools_do(tmp_path):
    written = {}
    for name in ("kohya", "comfyui", "diffusers"):
        DIALECTS[name].write(tmp_path / name, mixed_adapter(sdxl=True))
        written[name] = load_file(tmp_path / name).keys()
    assert "lora_unet_input_blocks_7_1_transformer_blocks_1_attn1_to_q.alpha" in written["kohya"]
    assert "lora_unet_middle_block_2_in_layers_2.lora_up.weight" in written["kohya"]
    assert "lora_unet_output_blocks_5_2_conv.lora_up.weight" in written["kohya"]
    assert "lora_te1_text_model_encoder_layers_1_mlp_fc1.alpha" in written["kohya"]
    place = "input_blocks.7.1.transformer_blocks.1.attn2.to_out.0"
    assert f"diffusion_model.{place}.lora_down.weight" in written["comfyui"]
    clip = "text_encoder_2.text_model.encoder.layers.0.self_attn.v_proj"
    assert f"{clip}.lora_A.weight" in written["diffusers"]


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_sgm_names_agree_with_a_walk_through_the_network(family):
    for path, sgm in sgm_paths(family).items():
        ours, theirs = path.replace(".", "_"), sgm.replace(".", "_")
        assert to_sgm(ours, family) == theirs
        assert from_sgm(theirs) == ours


def test_every_layer_has_a_path_in_every_dialect(tmp_path):
    for family in ("sd", "sdxl"):
        names = {module_name(*layer) for layer in published_layers(family)}
        pairs = [pair(name, 2, 2, 1) for name in sorted(names)]
        for dialect in DIALECTS:
            path = target(tmp_path, f"{dialect}")
            DIALECTS[dialect].write(path, Adapter(pairs, AdapterInfo()))
            assert set(load_adapter(path).names()) == names


SPELLINGS = {
    "kohya": ("lora_unet_{flat}", ".lora_down.weight", ".lora_up.weight"),
    "comfyui": ("lycoris_{flat}", ".lora_down.weight", ".lora_up.weight"),
    "comfyui sgm": ("diffusion_model.{sgm}", ".lora_A.weight", ".lora_B.weight"),
    "diffusers": ("unet.{dotted}", ".lora_A.weight", ".lora_B.weight"),
    "diffusers attention": ("unet.{dotted}", ".lora.down.weight", ".lora.up.weight"),
    "diffusers before 2023-09": ("unet.{processor}", "_lora.down.weight", "_lora.up.weight"),
    "diffusers unet alone": ("{processor}", "_lora.down.weight", "_lora.up.weight"),
    "diffusers text": ("text_encoder.{clip}", ".lora_linear_layer.down.weight",
                       ".lora_linear_layer.up.weight"),
    "diffusers flat text": ("text_encoder.{clip_flat}", ".lora_A.weight", ".lora_B.weight"),
    "kohya text by diffusers": ("lora_te1_encoder_layers_3_mlp_fc2", ".lora_down.weight",
                                ".lora_up.weight"),
    "peft": ("base_model.model.{dotted}", ".lora_A.weight", ".lora_B.weight"),
    "peft text": ("base_model.model.{clip}", ".lora_A.default.weight", ".lora_B.default.weight"),
}  # fmt: skip


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_key_spellings_of_published_files_are_read(spelling):
    stem, down, up = SPELLINGS[spelling]
    text = "clip" in stem or "lora_te" in stem
    path = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_out.0"
    stem = stem.format(
        flat=path.replace(".", "_"),
        sgm="input_blocks.4.1.transformer_blocks.0.attn2.to_out.0",
        dotted=path,
        processor=path.replace("attn2.to_out.0", "attn2.processor.to_out"),
        clip="text_model.encoder.layers.3.mlp.fc2",
        clip_flat="encoder.layers.3.mlp.fc2",
    )
    name = "lora_te_text_model_encoder_layers_3_mlp_fc2" if text else f"{BLOCK}_attn2_to_out_0"
    dialect = spelling.split()[0]
    assert locate(stem + down) == (dialect, name, "down")
    assert locate(stem + up) == (dialect, name, "up")


def test_a_file_of_mixed_suffixes_is_read_whole(tmp_path):
    torch.manual_seed(0)
    path = "down_blocks.0.attentions.0.transformer_blocks.0"
    tensors = {
        f"unet.{path}.attn1.to_q.lora.down.weight": torch.randn(4, 8),
        f"unet.{path}.attn1.to_q.lora.up.weight": torch.randn(8, 4),
        f"unet.{path}.ff.net.2.lora_A.weight": torch.randn(2, 8),
        f"unet.{path}.ff.net.2.lora_B.weight": torch.randn(8, 2),
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.down.weight":
            torch.randn(4, 8),
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.up.weight":
            torch.randn(8, 4),
    }  # fmt: skip
    save_file(tensors, tmp_path / "mixed.safetensors")
    adapter = load_adapter(tmp_path / "mixed.safetensors")
    assert len(adapter.pairs) == 3 and {p.scale for p in adapter.pairs} == {1.0}
    assert adapter.notes == ("3 modules state no alpha: taken as alpha = rank (scale 1)",)


def test_alpha_and_rslora_of_a_peft_configuration_are_used(tmp_path):
    original = mixed_adapter()
    ranks = {"attn2.to_out.0": 6, "mid_block.resnets.1.conv1": 3, "conv": 2, "proj_in": 2}
    config = {"r": 4, "lora_alpha": 8, "alpha_pattern": {"attn2.to_out.0": 3.0, "conv1": 6},
              "rank_pattern": ranks, "use_rslora": True}  # fmt: skip
    unet = [p for p in original.pairs if p.name.startswith("lora_unet")]
    folder = tmp_path / "rs"
    peft.write(folder, Adapter(unet, original.info))
    (folder / "unet" / peft.CONFIG).write_text(json.dumps(config))
    found = {p.name: p for p in load_adapter(folder / "unet").pairs}
    for each in unet:
        alpha = 3.0 if "to_out" in each.name else 6 if "conv1" in each.name else 8
        assert found[each.name].scale == pytest.approx(alpha / math.sqrt(each.rank))
    config |= {"rank_pattern": {"proj_in": 3, "proj_out": 3}}
    header = {"lora_adapter_metadata": json.dumps({f"unet.{k}": v for k, v in config.items()})}
    save_file(
        {f"unet.down_blocks.0.attentions.0.{place}.lora_{factor}.weight": torch.randn(3, 3)
         for place in ("proj_in", "proj_out") for factor in "AB"},
        tmp_path / "a.safetensors", header,
    )  # fmt: skip
    scales = {p.scale for p in load_adapter(tmp_path / "a.safetensors").pairs}
    assert scales == {8 / math.sqrt(3)}


def test_locon_with_a_core_is_exact(tmp_path):
    name, core = "lora_unet_mid_block_resnets_0_conv1", torch.randn(3, 3, 3, 3)
    up, down = torch.randn(6, 3, 1, 1), torch.randn(3, 5, 1, 1)
    tensors = {"lora_up.weight": up, "lora_down.weight": down, "lora_mid.weight": core}
    tensors = {f"{name}.{key}": value for key, value in tensors.items()}
    save_file(tensors | {f"{name}.alpha": torch.tensor(1.5)}, tmp_path / "a.safetensors")
    [found] = load_adapter(tmp_path / "a.safetensors").pairs
    expected = 0.5 * torch.nn.functional.conv2d(  # the layers one after the other on a unit image
        torch.nn.functional.conv2d(
            torch.nn.functional.conv2d(torch.eye(5)[:, :, None, None], down), core, padding=2
        ), up,
    ).flip(2, 3).transpose(0, 1)  # fmt: skip
    torch.testing.assert_close(delta_weight(found), expected)


def test_tokens_survive_saving_and_name_nothing_on_the_disk(tmp_path):
    tokens = {"<dog>": torch.randn(16, 1, 8), "<cat>": torch.randn(1, 3, 8)}
    # One alpha, with which the file keeps the factors to the bit.
    adapter = Adapter([pair(f"{BLOCK}_attn1_to_q", rank=4, alpha=2.0)], AdapterInfo(trigger="<t>"))
    with_tokens = Adapter(adapter.pairs, adapter.info, tokens)
    save_adapter(tmp_path / "a.safetensors", with_tokens)
    found = load_adapter(tmp_path / "a.safetensors")
    assert_same(found, adapter, 0)
    assert found.tokens.keys() == tokens.keys()
    assert all(torch.equal(found.tokens[word], tokens[word]) for word in tokens)
    for word in ("../../etc/passwd", "a/b", "..", "", "x\0y", ".hidden", "c:\\x"):
        with pytest.raises(AdapterError, match="cannot be the word"):
            save_adapter(
                tmp_path / "b.safetensors", Adapter([], adapter.info, {word: tokens["<cat>"]})
            )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors"]


EMBEDDINGS = {
    "a1111": ({"emb_params": (2, 8)}, {"dog": (1, 2, 8)}),
    "sdxl": ({"clip_l": (2, 8), "clip_g": (2, 12)}, {"dog": (1, 2, 8), "dog@2": (1, 2, 12)}),
    "bundle": ({"bundle_emb.me.string_to_param.*": (2, 8)}, {"me": (1, 2, 8)}),
    "inversion": ({"<cat>": (8,)}, {"<cat>": (1, 1, 8)}),
}


@pytest.mark.parametrize("layout", EMBEDDINGS)
def test_embeddings_are_read_as_tokens(tmp_path, layout):
    tensors, wanted = EMBEDDINGS[layout]
    save_file({k: torch.randn(shape) for k, shape in tensors.items()}, tmp_path / "dog.safetensors")
    adapter = load_adapter(tmp_path / "dog.safetensors")
    assert {word: tuple(rows.shape) for word, rows in adapter.tokens.items()} == wanted
    assert adapter.dialect == "embedding" and adapter.pairs == []
    [again] = [load_adapter(path) for path in embeddings.write(tmp_path, adapter)]
    shapes = sorted(tuple(rows.shape) for rows in again.tokens.values())
    assert shapes == sorted(wanted.values())


TWICE = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight"
REFUSED = {
    "are zero": lambda t: {k: torch.zeros_like(v) if "up" in k else v for k, v in t.items()},
    "NaN or infinity": lambda t: {k: v * torch.inf if "up" in k else v for k, v in t.items()},
    "twice": lambda t: t | {TWICE: torch.randn(4, 10)},
    "1 of 25 tensors are unknown": lambda t: t | {"lora_unet_x.lora_bias": torch.zeros(2)},
    "OFT or BOFT": lambda t: t | {"lora_unet_x.oft_blocks": torch.zeros(2, 3, 3)},
    "GLoRA": lambda t: t | {"lora_unet_x.a1.weight": torch.zeros(2, 3)},
    "IA3": lambda t: t | {"lora_unet_x.on_input": torch.tensor(True)},
    "VeRA": lambda t: t | {"unet.x.vera_lambda_b": torch.zeros(3)},
    "T5 text encoder": lambda t: t | {"text_encoder_3.x.lora_A.weight": torch.zeros(3, 3)},
    "not one per output (12)": lambda t: t | {f"{BLOCK}_attn1_to_q.dora_scale": torch.tensor(1.)},
    "has 2 values": lambda t: t | {f"{BLOCK}_attn1_to_q.alpha": torch.ones(2)},
    "not floating": lambda t: {k: v.int() if "up" in k else v for k, v in t.items()},
    "not one per output": lambda t: t | {f"{BLOCK}_attn1_to_q.dora_scale": torch.ones(1, 10)},
    "without its 'hada_w1_b'": lambda t: t | {f"{BLOCK}_attn1_to_v.hada_w1_a": torch.ones(3, 2)},
    "of LoRA and LoHa, which": lambda t: t | {f"{BLOCK}_attn1_to_q.hada_w1_a": torch.ones(3, 2)},
    "not a vector": lambda t: t | {f"{BLOCK}_attn1_to_q.diff_b": torch.ones(3, 2)},
}  # fmt: skip


@pytest.mark.parametrize("words", REFUSED)
def test_broken_content_is_refused_by_its_reason(tmp_path, words):
    path = tmp_path / "a.safetensors"
    save_adapter(path, mixed_adapter())
    save_file(REFUSED[words](load_file(path)), path)
    with pytest.raises(AdapterError, match=re.escape(words)) as refusal:
        load_adapter(path)
    assert str(path) in str(refusal.value)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_damaged_files_raise_only_adapter_errors(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("fuzz") / "a.safetensors"
    save_adapter(path, mixed_adapter())
    content = bytearray(path.read_bytes())
    size = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(0, 4))):
        place = data.draw(st.integers(0, size - 1))
        content[place] = data.draw(st.integers(0, 255))
    end = data.draw(st.integers(0, len(content)))
    path.write_bytes(bytes(content[:end] if data.draw(st.booleans()) else content))
    try:
        load_adapter(path)
    except AdapterError as error:
        assert str(path) in str(error)


@settings(max_examples=40, deadline=None)
@given(header=st.dictionaries(st.text(max_size=8), st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6), max_size=4))  # fmt: skip
def test_damaged_headers_raise_only_adapter_errors(tmp_path_factory, header):
    path = tmp_path_factory.mktemp("fuzz") / "a.safetensors"
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 64)
    with pytest.raises(AdapterError):
        load_adapter(path)
