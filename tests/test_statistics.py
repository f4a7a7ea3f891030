from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from random_adapters import random_adapter
from rite_diffusion.adapters.attach import adaptable_layers, attach
from rite_diffusion.errors import FusionError
from rite_diffusion.fusion import statistics
from rite_diffusion.fusion.measure import measure, sketched_layers
from rite_diffusion.fusion.members import digest_of
from rite_diffusion.fusion.prompts import concept_prompts
from rite_diffusion.fusion.sketch import load_sketch, save_sketch, sketch_path
from rite_diffusion.fusion.statistics import (
    Drawing,
    ExactSum,
    SketchSum,
    collect,
    input_rows,
    shared_inputs,
    watched,
)
from rite_diffusion.types import LoraPair

CPU = torch.device("cpu")
FEW = Drawing(steps=2)


def test_the_exact_sum_is_the_second_moment():
    inputs = torch.randn(50, 7)
    total = ExactSum(7, CPU)
    total.add(inputs[:20])
    total.add(inputs[20:])
    expected = inputs.double().mT @ inputs.double() / 50
    torch.testing.assert_close(total.second_moment().matrix(), expected, rtol=1e-5, atol=1e-6)


def test_the_sketch_is_exact_where_inputs_span_few_directions(monkeypatch):
    monkeypatch.setattr(statistics, "SKETCH_WIDTH", 16)
    inputs = torch.randn(90, 8) @ torch.randn(8, 60)
    total = SketchSum(60, CPU)
    for chunk in inputs.split(13):
        total.add(chunk)
    expected = inputs.double().mT @ inputs.double() / 90
    torch.testing.assert_close(total.second_moment().matrix(), expected, rtol=1e-4, atol=1e-4)


def test_the_sketch_keeps_the_trace_and_the_largest_directions(monkeypatch):
    monkeypatch.setattr(statistics, "SKETCH_WIDTH", 24)
    inputs = torch.randn(300, 60) * torch.logspace(0, -2, 60)
    total = SketchSum(60, CPU)
    total.add(inputs)
    moment, expected = total.second_moment(), inputs.double().mT @ inputs.double() / 300
    assert moment.trace == pytest.approx(expected.trace().item(), rel=1e-5)
    assert (moment.matrix() - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize(
    "layer",
    [nn.Linear(6, 5), nn.Conv2d(6, 5, 1), nn.Conv2d(6, 5, 3, padding=1, stride=2)],
    ids=["linear", "1x1", "3x3"],
)
def test_input_rows_times_the_flattened_weight_equal_the_layers_output(layer):
    shape = (2, 9, 6) if isinstance(layer, nn.Linear) else (2, 6, 8, 8)
    inputs = torch.randn(shape)
    rows = torch.cat(list(input_rows(layer, inputs)))
    layer.bias.data.zero_()
    outputs = layer(inputs)
    expected = outputs.movedim(1, -1) if inputs.ndim == 4 else outputs
    torch.testing.assert_close(
        rows @ layer.weight.flatten(1).mT, expected.reshape(-1, 5), rtol=1e-4, atol=1e-5
    )


def test_second_moments_are_those_of_the_features_a_layer_sees(tiny):
    names = [n for n in sketched_layers(tiny, []) if "attn2_to_q" in n or "attn2_to_k" in n]
    conv = next(
        n for n, (_, path) in adaptable_layers(tiny).items() if path.endswith("resnets.0.conv1")
    )
    names = [*names, conv]
    seen: dict[str, list] = {name: [] for name in names}
    handles = []
    for name, place in watched(tiny, names).items():
        handles.append(place.layer.register_forward_pre_hook(
            lambda layer, args, name=name: seen[name].extend(input_rows(layer, args[0]))
        ))  # fmt: skip
    moments = collect(tiny, ["a cat", "a dog"], names, FEW)
    for handle in handles:
        handle.remove()
    for name in names:
        rows = torch.cat(seen[name]).double()
        rows = rows[-moments[name].rows :]  # without the steps that look for shared inputs
        torch.testing.assert_close(
            moments[name].matrix(), rows.mT @ rows / len(rows), rtol=1e-3, atol=1e-5
        )


def test_layers_with_one_input_share_one_second_moment(tiny):
    names = sketched_layers(tiny, [])
    shared = shared_inputs(tiny, watched(tiny, names), ["a cat", ""])
    keys = [name for name in names if name.endswith(("attn2_to_k", "attn2_to_v"))]
    assert len(keys) > 2 and len({shared[name] for name in keys}) == 1
    block = next(name for name in names if name.endswith("attn1_to_q")).removesuffix("q")
    assert shared[block + "q"] == shared[block + "k"] == shared[block + "v"]
    assert shared[block + "q"] != shared[block + "out_0"]
    moments = collect(tiny, ["a cat"], names, FEW)
    assert moments.keys() == set(names)
    assert moments[block + "q"] is moments[block + "v"]


def test_layer_wise_embeddings_give_each_layer_its_own_statistics(tiny):
    names = [name for name in sketched_layers(tiny, []) if "attn2_to_k" in name]
    width = tiny.text_encoder.get_input_embeddings().embedding_dim
    words = {"<t>": torch.randn(len(names), 2, width)}
    attach(tiny, replace(random_adapter(tiny), tokens=words), "words")
    moments = collect(tiny, ["a cat", "a <t>"], names, FEW)
    matrices = [moments[name].matrix() for name in names]
    assert all(
        not torch.equal(one, other) for one, other in zip(matrices, matrices[1:], strict=False)
    )


def test_statistics_leave_the_model_as_it_was(tiny):
    adapter = random_adapter(tiny)
    keys = tiny.unet.state_dict().keys()
    hooks = [len(m._forward_pre_hooks) for m in tiny.unet.modules()]
    [sketch] = measure(tiny, [adapter], [["a <t>"]], FEW)
    assert tiny.unet.state_dict().keys() == keys
    assert [len(m._forward_pre_hooks) for m in tiny.unet.modules()] == hooks
    name = adapter.pairs[0].name
    attach(tiny, adapter, "again")
    again = collect(tiny, ["a <t>"], [name], FEW)[name]
    torch.testing.assert_close(sketch.concept[name].matrix(), again.matrix())


def test_a_sketch_file_makes_the_round_trip(tiny, tmp_path):
    adapter = random_adapter(tiny)
    [sketch] = measure(tiny, [adapter], [["a <t>"]], FEW)
    path = sketch_path(tmp_path / "a.safetensors")
    assert path.name == "a.sketch.safetensors"
    save_sketch(path, sketch, keep=400)
    again = load_sketch(path)
    assert again.metadata == sketch.metadata and again.metadata.adapter == digest_of(adapter)
    for side, other in ((sketch.concept, again.concept), (sketch.base, again.base)):
        for name, moment in side.items():
            expected = moment.matrix()
            off = (other[name].matrix() - expected).norm() / expected.norm()
            assert off < 5e-3 and other[name].rows == moment.rows
    save_sketch(tmp_path / "small", sketch, keep=8)
    assert (tmp_path / "small").stat().st_size < 0.4 * path.stat().st_size
    assert load_sketch(tmp_path / "small").concept[name].trace == pytest.approx(
        sketch.concept[name].trace, rel=1e-2
    )


def test_files_that_are_no_sketch_are_refused(tmp_path):
    path = tmp_path / "a.sketch.safetensors"
    path.write_bytes(b"nonsense")
    with pytest.raises(FusionError, match="is damaged"):
        load_sketch(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(FusionError, match="is not a sketch"):
        load_sketch(path)
    save_file({"a": torch.zeros(1)}, path, {"rite_sketch": "1", "layers": "{"})
    with pytest.raises(FusionError, match="is incomplete"):
        load_sketch(path)


def test_an_adapter_without_trigger_needs_prompts(tiny):
    adapter = random_adapter(tiny)
    assert "a photo of a <t>" in concept_prompts(adapter.info, Path("f"))
    with pytest.raises(FusionError, match="rite sketch f --prompt"):
        concept_prompts(replace(adapter.info, trigger=""), Path("f"))


def test_pairs_outside_the_attentions_are_sketched_too(tiny):
    name = next(n for n, (_, path) in adaptable_layers(tiny).items() if path.endswith("conv_in"))
    pair = LoraPair(name, torch.randn(1, 4, 3, 3), torch.randn(32, 1, 1, 1), 1.0)
    adapter = replace(random_adapter(tiny), pairs=[pair])
    [sketch] = measure(tiny, [adapter], [["a <t>"]], FEW)
    assert sketch.concept[name].width == 36 and name in sketch.base
