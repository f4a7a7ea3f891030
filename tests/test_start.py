"""`lora.init_from`: a training that starts from an adapter file."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import rite_diffusion as rite
from random_adapters import random_adapter, varied_adapter
from rite_diffusion.adapters import load_adapter, save_adapter
from rite_diffusion.adapters.attach import attach, detach
from rite_diffusion.adapters.delta import delta_weight
from rite_diffusion.errors import RiteError
from rite_diffusion.generation.denoise import sample
from rite_diffusion.methods.lora import PlainLora
from rite_diffusion.optim import OPTIMIZERS
from rite_diffusion.types import Shift
from runs import Stop, config_of, crash_at, same_run, train

DIALECTS = {"kohya": "a.safetensors", "diffusers": "b.safetensors", "peft": "b"}


@pytest.fixture
def start(pocket, tmp_path):
    """A file with pairs of rank 4 and alpha 2 on every attention projection."""
    save_adapter(tmp_path / "a.safetensors", random_adapter(pocket))
    return tmp_path / "a.safetensors"


@pytest.mark.parametrize("dialect", DIALECTS)
def test_the_first_step_begins_at_the_files_updates(pocket, photos, start, tmp_path, dialect):
    file = start
    if dialect != "kohya":
        file = tmp_path / DIALECTS[dialect]
        rite.convert(start, dialect, file)
    wanted = {pair.name: pair for pair in load_adapter(file).pairs}
    method = PlainLora(pocket, config_of(photos, lora={"init_from": str(file)}))
    found = {pair.name: pair for pair in method.pairs()}
    assert found.keys() == wanted.keys()
    for name, pair in found.items():
        assert torch.equal(delta_weight(pair), delta_weight(wanted[name]))
        assert pair.up.requires_grad and pair.down.requires_grad
    method.remove()


def test_the_first_preview_is_what_the_file_draws(pocket, photos, start):
    def drawn():
        return sample(pocket, ["a <t> on a red background"], [7], steps=3)[0].tobytes()

    plain = drawn()
    attach(pocket, load_adapter(start), "start")
    by_file = drawn()
    detach(pocket, "start")
    method = PlainLora(pocket, config_of(photos, lora={"init_from": str(start)}))
    with torch.no_grad():
        in_training = drawn()
    method.remove()
    assert in_training == by_file != plain


def test_layers_that_the_file_lacks_begin_at_zero(pocket, photos, start, tmp_path):
    adapter = load_adapter(start)
    save_adapter(tmp_path / "few.safetensors", replace(adapter, pairs=adapter.pairs[:3]))
    config = config_of(photos, lora={"init_from": str(tmp_path / "few.safetensors")})
    method = PlainLora(pocket, config)
    moved = [pair.name for pair in method.pairs() if delta_weight(pair).abs().max() > 0]
    assert set(moved) == {pair.name for pair in adapter.pairs[:3]} and len(method.pairs()) > 3
    method.remove()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_goes_on_from_a_file(photos, start, tmp_path, optimizer):
    found = train(
        photos, tmp_path / "run", optim={"name": optimizer}, lora={"init_from": str(start)}
    )
    before = {pair.name: delta_weight(pair) for pair in load_adapter(start).pairs}
    for pair in load_adapter(found).pairs:
        change = (delta_weight(pair) - before[pair.name]).norm() / before[pair.name].norm()
        assert 0 < change < 0.5


def test_a_stopped_run_from_a_file_goes_on_bit_for_bit(photos, start, tmp_path):
    settings = {"steps": 4, "lora": {"init_from": str(start)}, "previews": {"every": 0}}
    train(photos, tmp_path / "whole", **settings)
    with pytest.raises(Stop):
        train(photos, tmp_path / "parts", on_step=crash_at(2), **settings)
    train(photos, tmp_path / "parts", **settings)
    same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_changed_file_is_noticed_when_a_run_goes_on(pocket, photos, start, tmp_path):
    settings = {"steps": 4, "lora": {"init_from": str(start)}, "previews": {"every": 0}}
    with pytest.raises(Stop):
        train(photos, tmp_path / "run", on_step=crash_at(2), **settings)
    save_adapter(start, random_adapter(pocket, seed=1))
    with pytest.raises(RiteError, match=r"lora\.init_from"):
        train(photos, tmp_path / "run", **settings)


def test_the_command_takes_rank_and_alpha_from_the_file(command, photos, pocket, tmp_path):
    save_adapter(tmp_path / "six.safetensors", random_adapter(pocket, rank=6, alpha=9.0))
    done = command(
        "train", photos, "--trigger", "<thing>", "--class", "toy", "--steps", "1", "--init",
        "six.safetensors", "--out", "run", "--set", "prior.weight=0", "--set", "previews.every=0",
        "--set", "lora.layers=attention",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "rank 6, from six.safetensors" in done.stdout
    adapter = load_adapter(tmp_path / "run/adapter.safetensors")
    assert adapter.ranks() == [6] and {pair.scale for pair in adapter.pairs} == {1.5}
    text = (tmp_path / "run/config.toml").read_text()
    assert "rank = 6" in text and 'init_from = "six.safetensors"' in text
    assert str(tmp_path) not in json.dumps(adapter.info.config)


def with_tokens(adapter):
    return replace(adapter, tokens={"<t>": torch.zeros(1, 1, 8)})


def of_convolutions(adapter):
    return replace(adapter, pairs=[replace(p, name=p.name + "_x") for p in adapter.pairs])


def with_shift(adapter):
    return replace(adapter, shifts=[Shift(adapter.pairs[0].name, "bias", torch.ones(8))])


def of_other_base(adapter):
    return replace(adapter, info=replace(adapter.info, base="sd15", base_fingerprint="0" * 16))


def with_alpha_zero(adapter):
    return replace(adapter, pairs=[replace(pair, scale=0.0) for pair in adapter.pairs])


BAD = {
    "embeddings": (with_tokens, {}, "learned embeddings"),
    "shifts": (with_shift, {}, "differences of biases"),
    "other modules": (of_convolutions, {}, "not in pocket"),
    "other base": (of_other_base, {}, "trained on 'sd15'"),
    "alpha 0": (with_alpha_zero, {}, "alpha of .* is 0"),
    "text encoder": (lambda a: a, {"lora": {"text_encoder": False}}, "set lora.layers = blocks or"),
    "method": (lambda a: a, {"method": "pivotal"}, "lora.init_from is for method lora"),
    "rslora": (lambda a: a, {"lora": {"kind": "rslora"}}, "lora.kind = lora"),
    "DoRA": (lambda a: a, {"lora": {"kind": "dora"}}, "lora.kind = lora"),
    "rank": (lambda a: a, {"lora": {"rank": 8}}, "lora.rank = 8, but a.safetensors .* has 4"),
    "alpha": (lambda a: a, {"lora": {"alpha": 3.0}}, "lora.alpha = 3.0, but a.safetensors .* 2"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_file_that_cannot_be_gone_on_from_is_refused(pocket, photos, tmp_path, case):
    change, settings, message = BAD[case]
    save_adapter(tmp_path / "a.safetensors", change(random_adapter(pocket)))
    lora = {"init_from": str(tmp_path / "a.safetensors")} | settings.get("lora", {})
    with pytest.raises(RiteError, match=message):
        train(photos, tmp_path / "run", **settings | {"lora": lora})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("dora", [True, False])
def test_pairs_of_several_ranks_and_dora_are_refused(pocket, photos, tmp_path, dora):
    save_adapter(tmp_path / "a.safetensors", varied_adapter(pocket, dora=dora))
    message = "DoRA norms" if dora else "different values of rank, . in lora_.* and . in lora_"
    with pytest.raises(RiteError, match=message):
        train(photos, tmp_path / "run", lora={"init_from": str(tmp_path / "a.safetensors")})


def test_a_missing_file_is_refused(photos, tmp_path):
    with pytest.raises(RiteError, match=r"nowhere\.safetensors"):
        train(photos, tmp_path / "run", lora={"init_from": str(tmp_path / "nowhere.safetensors")})


def test_nothing_but_the_factors_is_taken_over(photos, start, tmp_path):
    found = train(photos, tmp_path / "run", steps=1, lora={"init_from": str(start)})
    assert load_adapter(found).info.trigger == "<thing>"
    assert load_file(found).keys() == load_file(start).keys()
