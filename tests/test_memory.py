"""Bases with weights in 8 bits or in main memory: how small, how close, and what is refused."""

import importlib.util
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers.hooks import group_offloading
from safetensors.torch import load_file
from torch import nn

import rite_diffusion as rite
from flow_bases import adapter_on, latents_of
from flow_models import PIPELINES, with_random_weights
from random_adapters import varied_adapter
from rite_diffusion.adapters import Adapter, AdapterInfo, save_adapter
from rite_diffusion.adapters.attach import attach, base_weights, detach
from rite_diffusion.backbones import memory as storing
from rite_diffusion.backbones.families import family_of
from rite_diffusion.backbones.memory import is_quantised, offload_models, stored_tensors
from rite_diffusion.backbones.source import load_backbone
from rite_diffusion.config import MemorySection, memory_settings
from rite_diffusion.errors import AdapterError, ConfigError
from rite_diffusion.fusion.statistics import Drawing
from rite_diffusion.generation.denoise import sample
from rite_diffusion.methods.lora import Lora
from rite_diffusion.optim import OPTIMIZERS
from rite_diffusion.photos.dataset import LatentSet
from rite_diffusion.training.batch import draw_batch
from rite_diffusion.training.loss import diffusion_loss
from rite_diffusion.training.memory import out_of_memory_error
from runs import Stop, config_of, crash_at, metrics, same_run, train

CPU = torch.device("cpu")
FLOW = {
    "steps": 4, "resolution": 64, "precision": "fp32", "prior": {"weight": 0}, "batch": 2,
    "previews": {"every": 0}, "lora": {"text_encoder": False, "rank": 2}, "trigger": "<thing>",
    "class_noun": "toy", "optim": {"name": "rite", "lr": 1e-2},
}  # fmt: skip
# Relative errors of a weight that is rounded to 8 bits with a scale for each output.
ROUNDING = {"int8": 0.012, "fp8": 0.035}

FOLLOWS = {"int8": 0.03, "fp8": 0.1}  # most relative difference of the losses of a training's steps

with_torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="torchao is not installed"
)
both = pytest.mark.parametrize("weights", ["int8", "fp8"])
QUICK_ONES = ("z-image", "flux", "sd3")  # the other families are slow tests
every_family = pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[] if n in QUICK_ONES else pytest.mark.slow) for n in PIPELINES],
)


@pytest.fixture(scope="session")
def flow_folder(tmp_path_factory):
    """A function that gives a family's folder."""
    root, written = tmp_path_factory.mktemp("flows"), {}

    def folder(name):
        if name not in written:
            torch.manual_seed(0)
            with_random_weights(PIPELINES[name]()).save_pretrained(root / name)
            written[name] = str(root / name)
        return written[name]

    return folder


def size(module):
    """Bytes of a module's weights as they are stored."""
    return sum(part.nbytes for each in module.parameters() for part in stored_tensors(each))


def linear_layers(module):
    return [each for each in module.modules() if isinstance(each, nn.Linear)]


# --- how small, how close ----------------------------------------------------------------------


@with_torchao
@both
@every_family
def test_every_familys_weights_shrink_and_stay_close(name, weights, flow_folder):
    base = flow_folder(name)
    full = load_backbone(base, "bf16")
    small = load_backbone(base, "bf16", memory=memory_settings({"weights": weights}))
    assert small.fingerprint == full.fingerprint and small.dtype == torch.bfloat16
    found = list(zip(linear_layers(full.denoiser), linear_layers(small.denoiser), strict=True))
    ends = {small.denoiser.get_submodule(path) for path in small.ends}
    for one, other in found:
        assert is_quantised(other) == (other not in ends)
        if other not in ends:
            wanted, got = one.weight.float(), other.weight.dequantize().float()
            assert (got - wanted).norm() < ROUNDING[weights] * wanted.norm()
            values, scales, *_ = stored_tensors(other.weight)
            assert values.nbytes == wanted.numel() and scales.numel() == len(wanted)
    noisy, times = latents_of(full), torch.tensor([500.0])
    one, other = (
        each.denoise(noisy, times, full.encode_prompts(["a cat"])).float() for each in (full, small)
    )
    assert 0 < (one - other).norm() < 0.15 * one.norm()


@with_torchao
@both
def test_the_pocket_shrinks_and_draws_the_same_picture(weights, pocket):
    small = rite.load_base("pocket", memory={"weights": weights, "encoder_weights": weights})
    linear = sum(layer.weight.nbytes for layer in linear_layers(pocket.denoiser))
    stored = size(small.denoiser) - (size(pocket.denoiser) - linear)
    assert stored < 0.26 * linear  # a byte of four, and a scale for each output
    assert size(small.text_encoder) < 0.51 * size(pocket.text_encoder)  # embeddings stay in full
    assert small.text_fingerprint != pocket.text_fingerprint
    one, other = (
        np.asarray(sample(each, ["a red cat"], [0], steps=5)[0], float) for each in (pocket, small)
    )
    assert 0 < abs(one - other).mean() < 5  # of 255


# --- training ----------------------------------------------------------------------------------


@with_torchao
@both
@pytest.mark.parametrize("name", QUICK_ONES)
def test_a_training_follows_that_on_full_weights(name, weights, flow_folder, photos, tmp_path):
    base = flow_folder(name)
    for each in ("full", weights):
        rite.train(
            photos, base=base, out=tmp_path / each, memory={"weights": each},
            **FLOW | {"previews": {"every": 4, "steps": 1}},
        )  # fmt: skip
    one, other = (np.array(metrics(tmp_path / each))[:, 1] for each in ("full", weights))
    assert (one != other).all() and np.allclose(one, other, rtol=0.03)
    assert len(list((tmp_path / weights / "previews").iterdir())) == 2
    adapter = tmp_path / weights / "adapter.safetensors"
    attach(load_backbone(base), rite.inspect(adapter), "one")  # fits the full base
    drawn = [
        rite.generate("a <thing>", base=base, adapters=[adapter], steps=2, width=64, height=64,
                      memory={"weights": each})[0]
        for each in ("full", weights)
    ]  # fmt: skip
    assert drawn[0].tobytes() != drawn[1].tobytes()


@with_torchao
@both
def test_a_pocket_training_follows_that_on_full_weights(weights, photos, tmp_path):
    small = {"weights": weights, "encoder_weights": weights}
    for name, memory in (("full", {}), (weights, small)):
        train(photos, tmp_path / name, steps=6, previews={"every": 0}, memory=memory)
    one, other = (np.array(metrics(tmp_path / each))[:, 1] for each in ("full", weights))
    assert (one != other).all() and np.allclose(one, other, rtol=FOLLOWS[weights])
    full, rounded = (
        load_file(tmp_path / each / "adapter.safetensors") for each in ("full", weights)
    )
    assert full.keys() == rounded.keys()
    assert all(full[key].shape == rounded[key].shape for key in full)


@with_torchao
@both
def test_a_killed_run_goes_on_bit_for_bit(weights, photos, tmp_path):
    memory = {"weights": weights, "encoder_weights": weights}
    train(photos, tmp_path / "whole", memory=memory)
    with pytest.raises(Stop):
        train(photos, tmp_path / "parts", memory=memory, on_step=crash_at(2))
    train(photos, tmp_path / "parts", memory=memory)
    same_run(tmp_path / "whole", tmp_path / "parts")


@with_torchao
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_takes_a_step_on_int8(name, photos, tmp_path):
    settings = {"previews": {"every": 0}, "optim": {"name": name}, "steps": 1}
    adapter = train(photos, tmp_path / "run", memory={"weights": "int8"}, **settings)
    assert any(pair.up.any() for pair in rite.inspect(adapter).pairs)


@with_torchao
@pytest.mark.parametrize("method", ["pivotal", "custom_diffusion", "ed_lora"])
def test_every_method_takes_a_step_on_int8(method, photos, tmp_path):
    memory = {"weights": "int8", "encoder_weights": "int8"}
    own = {"custom_diffusion": {"weights": "lora"}} if method == "custom_diffusion" else {}
    settings = {"previews": {"every": 0}, "steps": 1, "method": method, "memory": memory}
    adapter = rite.inspect(train(photos, tmp_path / "run", **settings | own))
    assert adapter.tokens and adapter.pairs


# --- adapters on quantised weights -------------------------------------------------------------


@with_torchao
@both
def test_an_adapters_update_is_the_same_on_rounded_weights(weights, flow_folder):
    """What an adapter adds to a layer's output does not depend on how the weight is stored."""
    found = []
    for each in ("full", weights):
        base = load_backbone(flow_folder("z-image"), memory=memory_settings({"weights": each}))
        layer = base.transformer.get_submodule("layers.0.attention.to_q")
        inputs = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(1))
        plain = layer(inputs)
        attach(base, adapter_on(base, ["layers.0.attention.to_q"]), "one")
        wrapped = base.transformer.get_submodule("layers.0.attention.to_q")
        found.append(wrapped(inputs) - plain)
        detach(base, "one")
        assert base.transformer.get_submodule("layers.0.attention.to_q") is layer
    assert torch.allclose(*found, atol=1e-5)


@with_torchao
def test_adapters_are_fused_by_statistics_of_an_int8_base(flow_folder, photos, tmp_path):
    base = rite.load_base(flow_folder("z-image"), memory={"weights": "int8"})
    paths = []
    for seed, word in enumerate(("one", "two")):
        adapter = adapter_on(base, base.lora_targets("transformer"), seed=seed)
        paths.append(tmp_path / f"{word}.safetensors")
        info = AdapterInfo(trigger=f"<{word}>", class_noun="toy", family=base.family)
        save_adapter(paths[-1], Adapter(adapter.pairs, info))
    out = rite.fuse(
        paths, base=base, out=tmp_path / "f.safetensors", drawing=Drawing(steps=1), allow_loss=True
    )
    assert len(rite.inspect(out).pairs) == len(rite.inspect(paths[0]).pairs)


@with_torchao
def test_dora_and_what_reads_weights_are_refused(tiny, tiny_folder):
    base = load_backbone(str(tiny_folder), memory=memory_settings({"weights": "int8"}))
    with pytest.raises(AdapterError, match="open with int8 weights.*weights = full"):
        base_weights(base)
    with pytest.raises(AdapterError, match="DoRA layer, whose norms need the weights"):
        attach(base, varied_adapter(tiny, dora=True), "one")
    assert not any(hasattr(layer, "lora_A") for layer in base.denoiser.modules())


# --- main memory -------------------------------------------------------------------------------


def gradients(base):
    """Loss and gradients of new pairs, with activations computed again."""
    base.checkpoint_gradients(True)
    latents = list(latents_of(base, 2) * 0.5)
    data = LatentSet(latents, None, [0, 1], ["a cat", "a dog"], [1.0] * 2, list("ab"))
    lora = Lora(base, rank=2, text_encoder=False)
    parameters = [each for group in lora.parameter_groups() for _, each in group["params"]]
    with torch.no_grad():
        torch.manual_seed(1)
        for each in parameters:
            each.add_(torch.randn_like(each) * 0.05)
    loss = diffusion_loss(base, draw_batch(base, data, 0, size=2))
    loss.backward()
    return [loss.detach(), *(each.grad for each in parameters if each.grad is not None)]


def opened_with(name, **memory):
    torch.manual_seed(0)
    pipeline = with_random_weights(PIPELINES[name]())
    return family_of(pipeline)(
        pipeline, name, CPU, "sdpa", lambda: None, None, MemorySection(**memory)
    )


@every_family
def test_layers_in_main_memory_give_the_same_gradients(name, monkeypatch):
    """While a layer does not run its weight is no number here, so an early or late use shows."""
    wanted, away = gradients(opened_with(name)), {}

    def onload(group):
        for weight in group.modules[0].parameters():
            weight.data = away.pop(weight, weight.data)

    def offload(group):
        for weight in group.modules[0].parameters():
            away.setdefault(weight, weight.data)
            weight.data = torch.full_like(weight.data, torch.nan)

    monkeypatch.setattr(group_offloading.ModuleGroup, "onload_", onload)
    monkeypatch.setattr(group_offloading.ModuleGroup, "offload_", offload)
    base = opened_with(name, offload="layers")
    layers = linear_layers(base.denoiser)
    found = gradients(base)
    assert len(found) == len(wanted)
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    assert {layer.weight for layer in layers} <= away.keys()


@with_torchao
@pytest.mark.parametrize("weights", ["full", "int8"])
def test_a_training_with_layers_in_main_memory_is_the_same(weights, flow_folder, photos, tmp_path):
    for offload in ("none", "layers"):
        memory = {"weights": weights, "offload": offload}
        rite.train(photos, base=flow_folder("z-image"), out=tmp_path / offload, memory=memory,
                   **FLOW)  # fmt: skip
    one, other = (load_file(tmp_path / each / "adapter.safetensors") for each in ("none", "layers"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


class Elsewhere(nn.Module):
    """A model that tells where it is; there is no second device here."""

    place = "cpu"

    def parameters(self, recurse=True):
        yield SimpleNamespace(device=torch.device(self.place))

    def to(self, device):
        self.place = str(device)
        return self

    def forward(self):
        return self.place


def test_one_model_is_on_the_device_at_a_time():
    models = [Elsewhere() for _ in range(3)]
    offload_models(models, torch.device("meta"))
    for running in (0, 1, 0, 2, 2, 1):
        assert models[running]() == "meta"
        assert [each.place for each in models].count("meta") == 1


# --- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"memory": {"weights": "int4"}}, r"setting 'memory\.weights' = 'int4'"),
        ({"method": "custom_diffusion", "memory": {"weights": "int8"}}, "whole matrices train"),
        ({"lora": {"kind": "dora"}, "memory": {"weights": "fp8"}}, "lora.kind = dora reads"),
        ({"lora": {"kind": "dora"}, "memory": {"encoder_weights": "fp8"}}, "lora.kind = dora"),
        ({"memory": {"offload": "layers"}}, "needs gradient_checkpointing = true"),
        ({"memory": {"offload": "model"}}, "text encoders leave the device"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(settings, words, photos):
    with pytest.raises(ConfigError, match=words):
        config_of(photos, **settings)


def refuse(*_, **__):
    raise AssertionError("the base was opened")


@pytest.mark.parametrize(
    ("memory", "words"),
    [
        ({"weights": "nf4"}, r"memory\.weights = nf4 needs a CUDA GPU, and this is cpu"),
        ({"encoder_weights": "nf4"}, r"memory\.encoder_weights = nf4 needs a CUDA GPU"),
        ({"offload": "model"}, "computes in main memory anyway"),
        ({"weights": "int8"}, r"needs torchao: pip install 'rite-diffusion\[memory\]'"),
        ({"encoder_weights": "fp8"}, r"needs torchao: pip install 'rite-diffusion\[memory\]'"),
    ],
)
def test_what_this_machine_lacks_is_named_before_a_base_is_opened(memory, words, monkeypatch):
    monkeypatch.setattr(storing, "find_spec", lambda name: None)
    monkeypatch.setattr("rite_diffusion.backbones.source.open_parts", refuse)
    with pytest.raises(ConfigError, match=words):
        rite.generate("a cat", memory=memory)


def test_a_missing_bitsandbytes_is_named(monkeypatch):
    monkeypatch.setattr(storing, "find_spec", lambda name: None)
    memory = memory_settings({"weights": "nf4"})
    with pytest.raises(ConfigError, match=r"needs bitsandbytes.*rite-diffusion\[nf4\]"):
        storing.check_memory(memory, "pocket", torch.device("cuda"))


def test_a_single_file_is_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match="single file, whose weights are kept in full"):
        rite.load_base(str(tmp_path / "model.safetensors"), memory={"weights": "int8"})


def test_the_error_without_memory_names_the_settings(photos):
    assert "memory.weights = int8" in str(out_of_memory_error(config_of(photos)))
