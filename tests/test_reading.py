"""Adapter files of other tools: their delta W is what those tools' own code computes."""

import itertools
import logging

import pytest
import torch
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from safetensors.torch import save, save_file
from torch import nn

from rite_diffusion.adapters import load_adapter
from rite_diffusion.adapters.delta import adapted_weight, delta_weight

BLOCK = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0"
CONV = "lora_unet_mid_block_resnets_0_conv1"

logging.getLogger("LyCORIS").setLevel(logging.ERROR)


def layer(kind: str) -> tuple[str, nn.Module]:
    if kind == "linear":
        return f"{BLOCK}_attn1_to_q", nn.Linear(24, 20)
    if kind == "1x1":
        return "lora_unet_mid_block_attentions_0_proj_in", nn.Conv2d(24, 20, 1)
    return CONV, nn.Conv2d(12, 20, 3)


def trained(kind: str, module: type, **settings):
    """A LyCORIS module with random factors, the layer's name, and its file."""
    name, base = layer(kind)
    made = module(name, base, 1.0, alpha=3, **settings)
    with torch.no_grad():
        for part in made.parameters():
            part.copy_(torch.randn_like(part) + 0.1)
    return name, made, {f"{name}.{k}": v.contiguous() for k, v in made.custom_state_dict().items()}


def assert_read_as(tmp_path, name, made, tensors):
    save_file(tensors, tmp_path / "a.safetensors")
    [pair] = load_adapter(tmp_path / "a.safetensors").pairs
    wanted = made.get_weight(made.shape).detach()
    torch.testing.assert_close(
        delta_weight(pair).reshape(wanted.shape), wanted, rtol=1e-4, atol=1e-4
    )
    return pair


@pytest.mark.parametrize("kind", ["linear", "1x1", "3x3"])
@pytest.mark.parametrize("rank", [1, 2, 3, 7])
@pytest.mark.parametrize("tucker", [False, True])
def test_loha_equals_lycoris(tmp_path, kind, rank, tucker):
    torch.manual_seed(0)
    settings = {"lora_dim": rank, "use_tucker": tucker}
    pair = assert_read_as(tmp_path, *trained(kind, LohaModule, **settings))
    assert pair.rank <= min(rank**2, 20)


LOKR = list(
    itertools.product(["linear", "1x1", "3x3"], [1, 2, 8], [-1, 2, 4], [False, True], [False, True])
)


@pytest.mark.parametrize(("kind", "rank", "factor", "tucker", "both"), LOKR)
def test_lokr_equals_lycoris(tmp_path, kind, rank, factor, tucker, both):
    torch.manual_seed(0)
    settings = {"lora_dim": rank, "factor": factor, "use_tucker": tucker, "decompose_both": both}
    assert_read_as(tmp_path, *trained(kind, LokrModule, **settings))


def test_a_lokr_with_a_tucker_core_equals_its_explicit_sum(tmp_path):
    torch.manual_seed(0)
    w1, core = torch.randn(2, 3), torch.randn(2, 4, 3, 3)
    a, b = torch.randn(2, 5), torch.randn(4, 6)
    tensors = {"lokr_w1": w1, "lokr_t2": core, "lokr_w2_a": a, "lokr_w2_b": b}
    tensors = {f"{CONV}.{k}": v for k, v in tensors.items()}
    save_file(tensors | {f"{CONV}.alpha": torch.tensor(2)}, tmp_path / "a.safetensors")
    [pair] = load_adapter(tmp_path / "a.safetensors").pairs
    wanted = torch.zeros(10, 18, 3, 3)
    for o1, o2, i1, i2 in itertools.product(range(2), range(5), range(3), range(6)):
        kernel = sum(core[p, q] * a[p, o2] * b[q, i2] for p in range(2) for q in range(4))
        wanted[o1 * 5 + o2, i1 * 6 + i2] = 2 / 4 * w1[o1, i1] * kernel
    torch.testing.assert_close(delta_weight(pair), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("module", [LohaModule, LokrModule])
@pytest.mark.parametrize("kind", ["linear", "3x3"])
def test_loha_and_lokr_with_norms_are_read_as_dora(tmp_path, kind, module):
    torch.manual_seed(0)
    name, made, tensors = trained(kind, module, lora_dim=2, weight_decompose=True)
    save_file(tensors, tmp_path / "a.safetensors")
    [pair] = load_adapter(tmp_path / "a.safetensors").pairs
    weight = made.org_weight.detach()
    delta = made.get_weight(made.shape).detach()
    wanted = made.apply_weight_decompose(weight + delta).detach()
    torch.testing.assert_close(adapted_weight(pair, weight), wanted, rtol=1e-4, atol=1e-4)


def test_a_loha_above_rank_64_is_read_exactly(tmp_path):
    torch.manual_seed(0)
    a1, b1, a2, b2 = (torch.randn(s) for s in ((160, 12), (12, 150), (160, 12), (12, 150)))
    tensors = dict(
        zip(("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), (a1, b1, a2, b2), strict=True)
    )
    name = f"{BLOCK}_attn1_to_q"
    save_file({f"{name}.{k}": v for k, v in tensors.items()}, tmp_path / "a.safetensors")
    adapter = load_adapter(tmp_path / "a.safetensors")
    wanted = (a1 @ b1) * (a2 @ b2)
    torch.testing.assert_close(delta_weight(adapter.pairs[0]), wanted, rtol=1e-4, atol=1e-3)
    assert "1 of LoHa; exact as LoRA of rank 144" in " ".join(adapter.notes)


SCALARS = list(
    itertools.product(
        [
            torch.int8,
            torch.int32,
            torch.int64,
            torch.uint8,
            torch.half,
            torch.bfloat16,
            torch.double,
        ],
        [[], [1], [1, 1]],
    )
)


@pytest.mark.parametrize(("kind", "shape"), SCALARS)
def test_alpha_is_read_in_any_dtype_and_shape(tmp_path, kind, shape):
    name = f"{BLOCK}_attn1_to_q"
    tensors = {
        f"{name}.lora_down.weight": torch.randn(4, 8),
        f"{name}.lora_up.weight": torch.randn(6, 4),
    }
    tensors[f"{name}.alpha"] = torch.full(shape, 6, dtype=kind)
    save_file(tensors, tmp_path / "a.safetensors")
    [pair] = load_adapter(tmp_path / "a.safetensors").pairs
    assert pair.scale == 1.5


def test_files_that_diffusers_writes_for_kohya_are_read(tmp_path):
    from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya

    down, up = torch.randn(4, 8), torch.randn(8, 4)
    stem = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    written = convert_state_dict_to_kohya(
        {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
    )
    assert any(not value.is_floating_point() for value in written.values())
    save_file(written, tmp_path / "a.safetensors")
    [pair] = load_adapter(tmp_path / "a.safetensors").pairs
    torch.testing.assert_close(delta_weight(pair), up @ down)


@pytest.mark.parametrize(
    ("down", "up"),
    [((4, 8), (6, 4, 1, 1)), ((4, 8, 1, 1), (6, 4)), ((4, 8, 3, 3), (6, 4))],
)
def test_convolution_factors_of_mixed_dimensions_are_read(tmp_path, down, up):
    tensors = {"lora_down.weight": torch.randn(down), "lora_up.weight": torch.randn(up)}
    save_file({f"{CONV}.{k}": v for k, v in tensors.items()}, tmp_path / "a.safetensors")
    [pair] = load_adapter(tmp_path / "a.safetensors").pairs
    wanted = tensors["lora_up.weight"].flatten(1) @ tensors["lora_down.weight"].flatten(1)
    torch.testing.assert_close(delta_weight(pair).flatten(1), wanted)


CLIP = "text_model.encoder.layers.3.mlp.fc2"
TEXT = {
    f"text_encoders.clip_l.transformer.{CLIP}": "lora_te",
    f"text_encoders.clip_g.transformer.{CLIP}": "lora_te2",
    f"text_encoders.clip_h.transformer.{CLIP}": "lora_te",
    f"clip_l.transformer.{CLIP}": "lora_te",
    f"clip_g.{CLIP}": "lora_te2",
    f"text_encoders_0.{CLIP}": "lora_te",
    f"text_encoders_1_{CLIP.replace('.', '_')}": "lora_te2",
}


@pytest.mark.parametrize("stem", TEXT)
def test_text_encoder_names_of_every_tool_are_read(tmp_path, stem):
    tensors = {f"{stem}.lora_{factor}.weight": torch.randn(4, 4) for factor in ("down", "up")}
    save_file(tensors, tmp_path / "a.safetensors")
    [pair] = load_adapter(tmp_path / "a.safetensors").pairs
    assert pair.name == f"{TEXT[stem]}_{CLIP.replace('.', '_')}"


def test_an_alpha_without_factors_is_ignored_with_a_note(tmp_path):
    name = f"{BLOCK}_attn1_to_q"
    tensors = {f"{name}.lora_{each}.weight": torch.randn(4, 4) for each in ("down", "up")}
    tensors |= {f"{name}.alpha": torch.tensor(4), f"{BLOCK}_attn1_to_k.alpha": torch.tensor(4)}
    save_file(tensors, tmp_path / "a.safetensors")
    adapter = load_adapter(tmp_path / "a.safetensors")
    assert adapter.names() == [name] and adapter.notes == ("1 alphas have no factors: left out",)


@pytest.mark.parametrize("size", [0x0280, 0x0380, 0x4B50, 0x013C])
def test_a_header_length_that_looks_like_another_format_is_read(tmp_path, size):
    name = f"{BLOCK}_attn1_to_q"
    tensors = {f"{name}.lora_{each}.weight": torch.ones(4, 4) for each in ("down", "up")}
    content = save(tensors, {"x": ""})
    length = int.from_bytes(content[:8], "little")
    padded = content[8 : 8 + length].ljust(size, b" ")
    assert length <= size
    path = tmp_path / "a.safetensors"
    path.write_bytes(size.to_bytes(8, "little") + padded + content[8 + length :])
    assert load_adapter(path).names() == [name]
