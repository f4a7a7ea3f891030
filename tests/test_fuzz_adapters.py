"""Files of odd names, shapes and types: an AdapterError, or exactly the delta W they spell out."""

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from rite_diffusion.adapters import Adapter, load_adapter
from rite_diffusion.adapters.delta import delta_weight
from rite_diffusion.adapters.dialects import DIALECTS
from rite_diffusion.adapters.verify import TOLERANCE
from rite_diffusion.errors import AdapterError

# How some tool names a module -> the toolkit's name.
STEMS = {
    "lora_unet_mid_block_resnets_0_conv1": "lora_unet_mid_block_resnets_0_conv1",
    "lora_unet_middle_block_2_out_layers_3": "lora_unet_mid_block_resnets_1_conv2",
    "lora_te1_text_model_encoder_layers_0_mlp_fc1": "lora_te_text_model_encoder_layers_0_mlp_fc1",
    "unet.up_blocks.1.attentions.0.proj_in": "lora_unet_up_blocks_1_attentions_0_proj_in",
    "base_model.model.conv_in": "lora_unet_conv_in",
    "diffusion_model.input_blocks.0.0": "lora_unet_conv_in",
    "text_encoders.clip_g.transformer.text_model.encoder.layers.1.mlp.fc2":
        "lora_te2_text_model_encoder_layers_1_mlp_fc2",
    "lora_unet_some_model_of_tomorrow": "lora_unet_some_model_of_tomorrow",
}  # fmt: skip
FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn]
OTHERS = [torch.int8, torch.int64, torch.bool, torch.complex64]
SIZES = st.integers(1, 4)
DOWN, UP = (".lora_down.weight", ".lora_A.weight"), (".lora_up.weight", ".lora_B.weight")


@st.composite
def numbers(draw, shape, kinds=FLOATS):
    """A tensor of small integers and halves, which every type holds exactly."""
    seed = draw(st.integers(0, 9))
    values = torch.randint(-4, 5, tuple(shape), generator=torch.Generator().manual_seed(seed)) / 2
    return values.to(draw(st.sampled_from(kinds)))


@st.composite
def module(draw) -> dict[str, torch.Tensor]:
    """A module's tensors by suffix: of one kind, rarely with one thing wrong."""
    out, into, rank, other = (draw(SIZES) for _ in range(4))
    kernel = draw(st.sampled_from([(), (), (1, 1), (3, 3), (3, 1)]))
    kind = draw(st.sampled_from(["lora", "lora", "locon", "loha", "lokr", "whole", "vectors"]))
    if kind == "lora":
        flat = draw(st.booleans())
        shapes = {DOWN[flat]: (rank, into, *kernel), UP[flat]: (out, rank, *(1 for _ in kernel))}
    elif kind == "locon":
        shapes = {DOWN[0]: (other, into, 1, 1), UP[0]: (out, rank, 1, 1),
                  ".lora_mid.weight": (rank, other, *(kernel or (3, 3)))}  # fmt: skip
    elif kind == "loha":
        shapes = {".hada_w1_a": (out, rank), ".hada_w1_b": (rank, into),
                  ".hada_w2_a": (out, other), ".hada_w2_b": (other, into)}  # fmt: skip
    elif kind == "lokr":
        shapes = {".lokr_w1": (out, into), ".lokr_w2_a": (other, rank), ".lokr_w2_b": (rank, 2)}
        if draw(st.booleans()):
            shapes = {".lokr_w1": (out, into), ".lokr_w2": (other, 2, *kernel)}
    elif kind == "whole":
        shapes = {".diff": (out, into, *kernel)}
    else:
        shapes = {draw(st.sampled_from([".w_norm", ".diff_b", ".b_norm", ".diff"])): (out,)}
    if kind != "vectors" and draw(st.booleans()):
        shapes[".diff_b"] = (out,)
    if draw(st.integers(0, 4)) == 0:  # something is wrong
        victim = draw(st.sampled_from(sorted(shapes)))
        shape = draw(st.lists(st.integers(0, 4), max_size=5))
        shapes.pop(victim)
        suffix = draw(st.sampled_from([victim, ".dora_scale", ".alpha", ".oft_blocks", ".x", ""]))
        if draw(st.booleans()):
            shapes[suffix] = shape
    kinds = FLOATS if draw(st.integers(0, 9)) else OTHERS
    tensors = {suffix: draw(numbers(shape, kinds)) for suffix, shape in shapes.items()}
    if draw(st.booleans()):
        shape = draw(st.sampled_from([(), (1,), (1, 1), (2,)]))
        value = torch.full(shape, draw(st.sampled_from([0, 1, 3, -2])))
        tensors[".alpha"] = value.to(draw(st.sampled_from([*FLOATS, torch.int64, torch.uint8])))
    return tensors


def literally(parts: dict[str, np.ndarray]) -> np.ndarray | None:
    """Delta W of a module's tensors by its definition, flat (out, inputs); None without one."""
    alpha = float(parts[".alpha"].item()) if ".alpha" in parts else None
    for down, up in zip(DOWN, UP, strict=True):
        if down in parts:
            a, b = parts[down], parts[up]
            rank = b.shape[1]
            if ".lora_mid.weight" in parts:
                a = np.einsum("pqkl,qi->pikl", parts[".lora_mid.weight"], a[:, :, 0, 0])
            product = b.reshape(len(b), -1) @ a.reshape(len(a), -1)
            return product * (1 if alpha is None else alpha / rank)
    if ".hada_w1_a" in parts:
        one, two = (parts[f".hada_w{i}_a"] @ parts[f".hada_w{i}_b"] for i in (1, 2))
        return one * two * (1 if alpha is None else alpha / len(parts[".hada_w1_b"]))
    if ".lokr_w1" in parts:
        whole = ".lokr_w2" in parts
        two = parts[".lokr_w2"] if whole else parts[".lokr_w2_a"] @ parts[".lokr_w2_b"]
        one = parts[".lokr_w1"].reshape(*parts[".lokr_w1"].shape, *[1] * (two.ndim - 2))
        scale = 1 if alpha is None or whole else alpha / len(parts[".lokr_w2_b"])
        product = np.kron(one, two) * scale
        return product.reshape(len(product), -1)
    if ".diff" in parts and parts[".diff"].ndim > 1:
        return parts[".diff"].reshape(len(parts[".diff"]), -1)
    return None


def assert_literal(adapter: Adapter, modules: dict[str, dict[str, torch.Tensor]]):
    """Every module that spells out an update has it, and nothing else has one."""
    pairs = {pair.name: pair for pair in adapter.pairs}
    wanted, vectors = {}, {}
    for name, parts in modules.items():
        arrays = {suffix: part.double().numpy() for suffix, part in parts.items()}
        delta = literally(arrays)
        if delta is not None:
            wanted[name] = delta
        for suffix, value in arrays.items():
            if suffix in (".diff_b", ".b_norm") or (
                suffix in (".w_norm", ".diff") and value.ndim < 2
            ):
                vectors[name, "bias" if "b" in suffix else "weight"] = value
    assert pairs.keys() == wanted.keys()
    for name, delta in wanted.items():
        found = delta_weight(pairs[name]).flatten(1).numpy()
        np.testing.assert_allclose(found, delta, rtol=1e-5, atol=1e-4 * (1 + np.abs(delta).max()))
    shifts = {(s.name, s.parameter): s.values.numpy() for s in adapter.shifts}
    assert shifts.keys() == vectors.keys()
    assert all(np.array_equal(shifts[place], vectors[place]) for place in vectors)


QUICK = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@QUICK
@given(content=st.dictionaries(st.sampled_from(sorted(STEMS)), module(), min_size=1, max_size=3))
def test_a_fuzzed_file_is_refused_or_read_literally(tmp_path, content):
    tensors = {stem + suffix: t for stem, parts in content.items() for suffix, t in parts.items()}
    path = tmp_path / "a.safetensors"
    save_file(tensors, path)
    try:
        adapter = load_adapter(path)
    except AdapterError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return
    modules: dict[str, dict[str, torch.Tensor]] = {}
    for stem, parts in content.items():
        modules.setdefault(STEMS[stem], {}).update(parts)
    if adapter.tokens:  # a tensor alone under a plain name is a word
        assert len(tensors) == 1
        return
    assert_literal(adapter, modules)
    for dialect, rules in DIALECTS.items():  # whatever was read can be written, or is refused
        target = tmp_path / f"written-{dialect}"
        try:
            rules.write(target, adapter)
            again = load_adapter(target)
        except AdapterError:
            continue
        found = {pair.name: delta_weight(pair) for pair in again.pairs}
        share = max(1e-4, TOLERANCE[adapter.dtype])  # of the file's precision
        for pair in adapter.pairs:
            delta = delta_weight(pair)
            error = (found[pair.name] - delta).abs().max()
            assert error <= share * (1 + delta.abs().max())


def test_the_fuzz_reaches_files_of_every_kind(tmp_path):
    """A fuzz whose files are all refused would prove nothing: count what is accepted."""
    accepted, kinds = [], set()

    @settings(max_examples=200, deadline=None, derandomize=True, database=None)
    @given(parts=module())
    def look(parts):
        save_file(
            {f"lora_unet_conv_in{k}": v for k, v in parts.items()}, tmp_path / "a.safetensors"
        )
        try:
            load_adapter(tmp_path / "a.safetensors")
        except AdapterError:
            accepted.append(False)
        else:
            accepted.append(True)
            kinds.update(parts)

    look()
    assert 0.3 < sum(accepted) / len(accepted) < 0.95
    assert {".hada_w1_a", ".lokr_w1", ".diff", ".diff_b", DOWN[0], ".lora_mid.weight"} <= kinds
