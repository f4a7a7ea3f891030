"""A denoiser's file, by the names of the original code, with the other parts of a model."""

import pytest
import torch
from safetensors.torch import save_file

import rite_diffusion as rite
from flow_models import PIPELINES, with_random_weights
from rite_diffusion.backbones.families import family_name
from rite_diffusion.backbones.source import load_backbone
from rite_diffusion.errors import BackboneError

PARTS = ("to_q", "to_k", "to_v")


def original_z_image(weights):
    """Z-Image's own layout: query, key and value in one matrix, and other names."""
    found = {}
    for name, value in weights.items():
        if name.endswith(tuple(f".attention.{part}.weight" for part in PARTS)):
            continue
        name = name.replace("all_x_embedder.2-1.", "x_embedder.")
        name = name.replace("all_final_layer.2-1.", "final_layer.")
        name = name.replace("attention.to_out.0.", "attention.out.")
        name = name.replace("attention.norm_q.", "attention.q_norm.")
        found[name.replace("attention.norm_k.", "attention.k_norm.")] = value.contiguous()
    blocks = {n.partition(".attention.to_q.weight")[0] for n in weights if "attention.to_q" in n}
    for block in blocks:
        parts = [weights[f"{block}.attention.{part}.weight"] for part in PARTS]
        found[f"{block}.attention.qkv.weight"] = torch.cat(parts)
    return found


def original_krea2(weights):
    """Krea 2's own layout."""
    names = {
        "img_in.": "first.", "time_embed.linear_1.": "tmlp.0.", "time_embed.linear_2.": "tmlp.2.",
        "time_mod_proj.": "tproj.1.", "txt_in.norm.weight": "txtmlp.0.scale",
        "txt_in.linear_1.": "txtmlp.1.", "txt_in.linear_2.": "txtmlp.3.",
        "text_fusion.": "txtfusion.", "transformer_blocks.": "blocks.",
        "final_layer.linear.": "last.linear.", "final_layer.norm.weight": "last.norm.scale",
        "final_layer.scale_shift_table": "last.modulation.lin",
    }  # fmt: skip
    within = {
        ".attn.to_q.": ".attn.wq.", ".attn.to_k.": ".attn.wk.", ".attn.to_v.": ".attn.wv.",
        ".attn.to_out.0.": ".attn.wo.", ".attn.to_gate.": ".attn.gate.",
        ".attn.norm_q.weight": ".attn.qknorm.qnorm.scale",
        ".attn.norm_k.weight": ".attn.qknorm.knorm.scale", ".ff.": ".mlp.",
        ".norm1.weight": ".prenorm.scale", ".norm2.weight": ".postnorm.scale",
    }  # fmt: skip
    found = {}
    for name, value in weights.items():
        start = next((each for each in names if name.startswith(each)), "")
        name = names.get(start, "") + name.removeprefix(start)
        for ours, theirs in within.items():
            name = name.replace(ours, theirs)
        if name.startswith("blocks.") and name.endswith(".scale_shift_table"):
            name, value = name.replace(".scale_shift_table", ".mod.lin"), value.flatten()
        found[name] = value.contiguous()
    return found


ORIGINAL = {
    "z-image": original_z_image,
    "krea2": original_krea2,
    "qwen-image": lambda weights: {name: value.contiguous() for name, value in weights.items()},
}


@pytest.mark.parametrize("name", ORIGINAL)
def test_a_denoisers_file_opens_with_a_models_other_parts(name, tmp_path):
    torch.manual_seed(0)
    pipeline = with_random_weights(PIPELINES[name]())
    pipeline.save_pretrained(tmp_path / "whole")
    with torch.no_grad():
        for weight in pipeline.transformer.parameters():
            weight += 0.1 * torch.randn_like(weight)
    wanted = pipeline.transformer.state_dict()
    save_file(ORIGINAL[name](wanted), tmp_path / "tuned.safetensors")
    base = f"{tmp_path / 'tuned.safetensors'}@{tmp_path / 'whole'}"
    assert family_name(base) == name
    found = load_backbone(base)
    assert all(torch.equal(v, wanted[k]) for k, v in found.transformer.state_dict().items())
    again = load_backbone(str(tmp_path / "whole"))
    prompts = ["a cat"]
    assert torch.equal(found.encode_prompts(prompts).states, again.encode_prompts(prompts).states)
    assert found.fingerprint != again.fingerprint


def test_an_adapter_on_it_trains_and_names_no_folder(photos, tmp_path):
    torch.manual_seed(0)
    pipeline = with_random_weights(PIPELINES["z-image"]())
    pipeline.save_pretrained(tmp_path / "whole")
    weights = original_z_image(pipeline.transformer.state_dict())
    save_file(weights, tmp_path / "tuned.safetensors")
    base = f"{tmp_path / 'tuned.safetensors'}@{tmp_path / 'whole'}"
    adapter = rite.train(
        photos, trigger="<x>", class_noun="toy", base=base, out=tmp_path / "run", steps=1,
        resolution=64, precision="fp32", previews={"every": 0},
    )  # fmt: skip
    info = rite.inspect(adapter).info
    assert info.base == "tuned.safetensors@whole" and str(tmp_path) not in info.config


@pytest.mark.parametrize(
    ("file", "whole", "words"),
    [
        ("tuned.safetensors", "pocket", "pocket is not a flow transformer"),
        ("none.safetensors", "whole", "none.safetensors does not exist"),
        ("tuned.safetensors", "whole", "does not fit .*whole's denoiser"),
    ],
)
def test_what_does_not_go_together_is_refused(file, whole, words, tmp_path):
    torch.manual_seed(0)
    with_random_weights(PIPELINES["z-image"]()).save_pretrained(tmp_path / "whole")
    save_file({"layers.0.attention.qkv.weight": torch.zeros(6, 2)}, tmp_path / "tuned.safetensors")
    model = whole if whole == "pocket" else tmp_path / whole
    with pytest.raises(BackboneError, match=words):
        load_backbone(f"{tmp_path / file}@{model}")
