"""Kinds of LoRA that train: rsLoRA and DoRA, beside plain LoRA."""

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.nn import functional as F

import rite_diffusion as rite
from predictions import prediction
from rite_diffusion.adapters import load_adapter
from rite_diffusion.adapters.attach import attach, detach
from rite_diffusion.config import from_toml
from rite_diffusion.errors import ConfigError
from rite_diffusion.methods.lora import Lora
from rite_diffusion.methods.weights import MAGNITUDE
from rite_diffusion.optim import OPTIMIZERS
from shared_bases import shared_base

QUICK = {
    "steps": 3, "batch": 2, "prior": {"weight": 0}, "previews": {"every": 0},
    "checkpoints": {"every": 3},
}  # fmt: skip
ABOUT = {"trigger": "<thing>", "class_noun": "toy"}


@pytest.fixture(scope="module")
def base(tiny_folder):
    return shared_base(str(tiny_folder))


def stirred(lora):
    """The weights moved away from their start."""
    draws = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for group in lora.parameter_groups():
            for name, parameter in group["params"]:
                noise = torch.randn(parameter.shape, generator=draws)
                parameter += 0.2 * parameter * noise if MAGNITUDE in name else 0.1 * noise
    return lora


@pytest.mark.parametrize("layers", ["attention", "blocks"])
@pytest.mark.parametrize("kind", ["rslora", "dora"])
def test_the_file_draws_what_the_training_model_drew(base, kind, layers, tmp_path):
    plain = prediction(base)
    lora = Lora(base, rank=3, alpha=2.0, kind=kind, layers=layers)
    assert kind == "dora" or torch.equal(prediction(base), plain)
    torch.testing.assert_close(prediction(base), plain, rtol=1e-4, atol=1e-5)
    stirred(lora)
    trained = prediction(base)
    path = lora.save(tmp_path / "a.safetensors", trigger="<a>")
    lora.remove()
    torch.testing.assert_close(prediction(base), plain, rtol=0, atol=0)
    attach(base, load_adapter(path), "a")
    drawn = prediction(base)
    detach(base, "a")
    assert (trained - plain).abs().max() > 0.01
    torch.testing.assert_close(drawn, trained, rtol=1e-3, atol=2e-4)


def test_rslora_scales_by_the_root_of_the_rank(base):
    lora = Lora(base, rank=16, alpha=2.0, kind="rslora")
    assert {pair.scale for pair in lora.pairs()} == {0.5}
    lora.remove()
    lora = Lora(base, rank=16, kind="rslora")
    assert {pair.scale for pair in lora.pairs()} == {1.0}
    lora.remove()


def test_dora_gradients_are_those_of_the_papers_rule():
    """Liu et al. 2024, Eq. 11: the norm is a constant in the backward pass."""
    torch.manual_seed(0)
    base, inputs = nn.Linear(5, 4, bias=False), torch.randn(7, 5)
    model = nn.Sequential(base)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"], use_dora=True), model, "a")
    layer = model[0]
    up, down = layer.lora_B["a"].weight, layer.lora_A["a"].weight
    magnitude = layer.lora_magnitude_vector["a"].weight
    nn.init.normal_(up)
    model(inputs).square().sum().backward()
    found = [each.grad.clone() for each in (up, down, magnitude)]
    factors = [each.detach().clone().requires_grad_() for each in (up, down, magnitude)]
    moved = base.weight.detach() + layer.scaling["a"] * factors[0] @ factors[1]
    norm = moved.norm(dim=1, keepdim=True).detach()
    F.linear(inputs, factors[2][:, None] * moved / norm).square().sum().backward()
    for ours, wanted in zip(found, factors, strict=True):
        torch.testing.assert_close(ours, wanted.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_trains_a_dora(optimizer, tiny_folder, photos, tmp_path):
    adapter = rite.train(
        photos, base=str(tiny_folder), out=tmp_path, lora={"kind": "dora", "rank": 2},
        optim={"name": optimizer}, **QUICK, **ABOUT,
    )  # fmt: skip
    pairs = load_adapter(adapter).pairs
    start = {pair.name: pair for pair in rite_start(tiny_folder)}
    moved = [(pair.magnitude - start[pair.name].magnitude).abs().max() for pair in pairs]
    assert all(pair.magnitude is not None for pair in pairs)
    assert 0 < max(moved) < 0.1


def rite_start(folder):
    """The pairs of a new DoRA, copied."""
    lora = Lora(shared_base(str(folder)), rank=2, kind="dora")
    pairs = [replace(pair, magnitude=pair.magnitude.detach().clone()) for pair in lora.pairs()]
    lora.remove()
    return pairs


def test_magnitudes_have_a_rate_of_their_own_and_no_decay(base):
    from rite_diffusion.methods.weights import lora_weights, parameter_groups

    def groups(lines):
        config = from_toml(
            f'photos = "a"\ntrigger = "<a>"\nclass_noun = "toy"\n[lora]\nkind = "dora"\n{lines}'
        )
        weights = lora_weights(base, config)
        found = {g["name"]: (g["lr"], g["weight_decay"]) for g in
                 parameter_groups(base, weights.named, config.optim)}  # fmt: skip
        weights.remove()
        return found

    own = groups("[optim]\nname = 'rite'\nlr_unet = 0.5\nlr_text_encoder = 0.25")
    assert own["unet"] == (0.5, 0.01)
    assert own["unet magnitudes"] == (OPTIMIZERS["adamw"].lr, 0.0)
    same = groups("[optim]\nname = 'adamw'\nlr_unet = 0.5\nlr_text_encoder = 0.25")
    assert same["unet magnitudes"] == (0.5, 0.0) and same["text_encoder magnitudes"][0] == 0.25
    given = groups("[optim]\nname = 'rite'\nlr_unet = 0.5\nlr_magnitudes = 0.125")
    assert given["unet magnitudes"][0] == 0.125


def test_a_dora_run_goes_on_as_if_it_had_not_ended(tiny_folder, photos, tmp_path):
    steady = {"name": "rite", "schedule": "constant", "warmup": 0}
    settings = {"lora": {"kind": "dora", "rank": 2}, "optim": steady}

    def run(out, steps):
        return rite.train(
            photos, base=str(tiny_folder), out=tmp_path / out,
            **QUICK | {"steps": steps, "ema": 0.5} | settings, **ABOUT,
        )  # fmt: skip

    whole = load_adapter(run("whole", 6))
    run("part", 3)
    resumed = load_adapter(run("part", 6))
    for one, other in zip(whole.pairs, resumed.pairs, strict=True):
        assert torch.equal(one.up, other.up) and torch.equal(one.magnitude, other.magnitude)


def test_unknown_kinds_are_refused(tiny_folder, photos, tmp_path):
    with pytest.raises(ConfigError, match=r"lora\.kind"):
        rite.train(photos, base=str(tiny_folder), lora={"kind": "oft"}, **ABOUT)
