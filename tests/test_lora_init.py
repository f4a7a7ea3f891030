"""`lora.init`: pairs that start from the weights (PiSSA) or along the gradient (LoRA-One)."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from predictions import PROMPT, TIME, noisy_latents, prediction, prediction_in_diffusers
from rite_diffusion.adapters import load_adapter
from rite_diffusion.adapters.attach import attach, base_layer, base_weights, detach
from rite_diffusion.adapters.delta import delta_weight
from rite_diffusion.adapters.names import module_name
from rite_diffusion.errors import ConfigError, RiteError
from rite_diffusion.methods import METHODS
from rite_diffusion.methods.init import follow_gradient, leading, set_product
from rite_diffusion.methods.lora import Lora
from rite_diffusion.methods.method import NAME
from rite_diffusion.optim import OPTIMIZERS
from runs import Stop, config_of, crash_at, same_run, train
from shared_bases import shared_base

LAYERS = ["attention", "blocks"]


@pytest.fixture(scope="module")
def base(tiny_folder):
    return shared_base(str(tiny_folder))


def loss_of(base):
    """A loss of one noisy picture, with its graph."""
    noisy = noisy_latents(base.latent_channels)
    return base.denoise(noisy, TIME, base.encode_captions([PROMPT])).square().mean()


def started(base, init, **settings):
    """New pairs of rank 3 with this start."""
    if init == "pissa":
        return Lora(base, rank=3, init="pissa", **settings)
    lora = Lora(base, rank=3, **settings)
    lora.follow_gradient(lambda: loss_of(base).backward(), 0.1)
    return lora


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("case", [("pissa", "lora"), ("pissa", "rslora"), ("lora_one", "lora")])
def test_the_file_draws_what_the_model_in_training_drew(base, tiny_folder, case, layers, tmp_path):
    init, kind = case
    plain = prediction(base)
    lora = started(base, init, kind=kind, alpha=2.0, layers=layers)
    if init == "pissa":
        torch.testing.assert_close(prediction(base), plain, rtol=1e-4, atol=1e-5)
    draws = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for group in lora.parameter_groups():
            for _, parameter in group["params"]:
                parameter += 0.05 * torch.randn(parameter.shape, generator=draws)
    trained = prediction(base)
    path = lora.save(tmp_path / "a.safetensors", trigger="<a>")
    lora.remove()
    assert torch.equal(prediction(base), plain)
    adapter = load_adapter(path)
    assert adapter.ranks() == [6 if init == "pissa" else 3]
    attach(base, adapter, "a")
    drawn = prediction(base)
    detach(base, "a")
    assert (trained - plain).abs().max() > 0.01
    torch.testing.assert_close(drawn, trained, rtol=1e-3, atol=2e-4)
    in_diffusers = prediction_in_diffusers(tiny_folder, path)
    torch.testing.assert_close(in_diffusers, drawn, rtol=1e-3, atol=2e-4)


def test_pissa_is_pefts():
    torch.manual_seed(0)
    layer = nn.Linear(12, 8, bias=False)
    whole = layer.weight.detach().clone()
    left, values, right = leading(whole, 3)
    model = nn.Sequential(layer)
    settings = {"r": 3, "lora_alpha": 6, "target_modules": ["0"], "init_lora_weights": "pissa"}
    inject_adapter_in_model(LoraConfig(**settings), model, "a")
    start = (left * values @ right).float()
    torch.testing.assert_close(model[0].base_layer.weight, whole - start, rtol=1e-4, atol=1e-5)
    found = 2 * model[0].lora_B["a"].weight @ model[0].lora_A["a"].weight
    torch.testing.assert_close(found, start, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (4, 4)])
def test_leading_directions_are_those_of_the_svd(shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    left, values, right = leading(matrix, 2)
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    torch.testing.assert_close(left * values @ right, u[:, :2] * s[:2] @ v[:2])
    torch.testing.assert_close(values, s[:2])


def test_the_pissa_start_is_split_evenly(base):
    lora = Lora(base, rank=3, alpha=6.0, init="pissa", layers="blocks")
    weights = base_weights(base)
    for pair in lora.pairs():
        up, down = pair.up[:, :3].flatten(1), pair.down[:3].flatten(1)
        torch.testing.assert_close(up.T @ up, down @ down.T, rtol=1e-3, atol=1e-5)
        u, s, v = torch.linalg.svd(weights[pair.name].flatten(1), full_matrices=False)
        torch.testing.assert_close(2.0 * up @ down, u[:, :3] * s[:3] @ v[:3], rtol=1e-3, atol=1e-4)
    lora.remove()


def steepest(gradient, rank, size):
    """The paper's start: the gradient's leading directions, as one step of that spectral norm."""
    u, s, v = torch.linalg.svd(gradient.double().flatten(1), full_matrices=False)
    return -size * (u[:, :rank] * s[:rank] / s[0]) @ v[:rank]


def gradients_by_weights(base, names):
    """The gradients of the loss by the base's weights, computed by autograd."""
    weights = {
        module_name(component, path): base_layer(module).weight
        for component, root in base.components.items()
        for path, module in root.named_modules()
        if module_name(component, path) in names
    }
    trained = [weights[name].requires_grad_() for name in names]
    found = torch.autograd.grad(loss_of(base), trained)
    for weight in weights.values():
        weight.requires_grad_(False)
    return dict(zip(names, found, strict=True))


@pytest.mark.parametrize("layers", LAYERS)
def test_lora_one_is_a_step_along_the_weights_gradient(base, layers):
    lora = Lora(base, rank=2, alpha=4.0, layers=layers)
    gradients = gradients_by_weights(base, [pair.name for pair in lora.pairs()])
    lora.follow_gradient(lambda: (loss_of(base).backward(), (2 * loss_of(base)).backward()), 0.1)
    for pair in lora.pairs():
        wanted = steepest(gradients[pair.name], 2, 0.1)
        found = delta_weight(pair).detach().double().flatten(1)
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-4)
        assert pair.up.grad is None and pair.down.grad is None
    lora.remove()


def test_the_begin_mark_of_custom_diffusion_gives_no_gradient(base, photos):
    config = config_of(
        photos, base=base.name, method="custom_diffusion", custom_diffusion={"weights": "lora"},
        lora={"rank": 2}, tokens={"vectors": 1},
    )  # fmt: skip
    method = METHODS["custom_diffusion"](base, config)
    gradients = gradients_by_weights(base, [pair.name for pair in method.pairs()])
    follow_gradient(base, NAME, lambda: loss_of(base).backward(), 0.1)
    for pair in method.pairs():
        found = delta_weight(pair).detach().double()
        torch.testing.assert_close(found, steepest(gradients[pair.name], 2, 0.1), rtol=0, atol=1e-4)
    method.remove()


def test_directions_that_a_gradient_lacks_can_still_be_learned(base):
    lora = Lora(base, rank=2, seed=1)
    [first, *_] = lora.pairs()
    random = first.down.detach().clone()
    one = torch.randn(first.up.shape[0], 1) @ torch.randn(1, first.down.shape[1])
    left, values, right = leading(one, 2)
    set_product(first, left, values, right)
    torch.testing.assert_close(delta_weight(first).detach(), one, rtol=1e-3, atol=1e-4)
    assert torch.equal(first.down[1], random[1]) and not first.up[:, 1].any()
    lora.remove()


@pytest.mark.parametrize("init", ["pissa", "lora_one"])
def test_a_stopped_run_goes_on_bit_for_bit(tiny_folder, photos, tmp_path, init):
    settings = {
        "base": str(tiny_folder),
        "steps": 4,
        "lora": {"init": init},
        "previews": {"every": 0},
        "ema": 0.5,
    }
    train(photos, tmp_path / "whole", **settings)
    with pytest.raises(Stop):
        train(photos, tmp_path / "parts", on_step=crash_at(2), **settings)
    train(photos, tmp_path / "parts", **settings)
    same_run(tmp_path / "whole", tmp_path / "parts")


HARDLY = {"lr": 1e-8, "lr_tokens": 1e-8, "weight_decay": 0}
OTHERS = {
    "pivotal": {},
    "ed_lora": {},
    "custom_diffusion": {"custom_diffusion": {"weights": "lora"}},
}


def spectral_norms(adapter):
    return [torch.linalg.matrix_norm(delta_weight(p).flatten(1), 2).item() for p in adapter.pairs]


@pytest.mark.parametrize("method", ["lora", *OTHERS])
def test_every_method_starts_along_its_gradient(tiny_folder, photos, tmp_path, method):
    settings = {"base": str(tiny_folder), "optim": HARDLY, "previews": {"every": 0}}
    settings |= {"lora": {"init": "lora_one", "init_size": 0.05}} | OTHERS.get(method, {})
    norms = spectral_norms(load_adapter(train(photos, tmp_path, method=method, **settings)))
    assert norms == pytest.approx([0.05] * len(norms), rel=1e-3)


@pytest.mark.parametrize("method", OTHERS)
def test_every_method_starts_from_the_weights(tiny_folder, photos, tmp_path, method):
    settings = {"base": str(tiny_folder), "optim": HARDLY, "previews": {"every": 0}}
    settings |= {"lora": {"init": "pissa"}} | OTHERS[method]
    adapter = load_adapter(train(photos, tmp_path, method=method, **settings))
    assert adapter.ranks() == [8] and max(spectral_norms(adapter)) < 1e-4


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("init", ["pissa", "lora_one"])
def test_every_optimizer_trains_from_there(tiny_folder, photos, tmp_path, init, optimizer):
    settings = {"lora": {"init": init, "rank": 2}, "optim": {"name": optimizer}, "steps": 10}
    settings |= {"base": str(tiny_folder), "previews": {"every": 0}, "checkpoints": {"every": 10}}
    if (init, optimizer) == ("lora_one", "scaled_sgd"):
        with pytest.raises(RiteError, match="scaled_sgd leaps"):
            train(photos, tmp_path / "run", **settings)
        return
    norms = spectral_norms(load_adapter(train(photos, tmp_path / "run", **settings)))
    assert 1e-7 < max(norms) < 1


def test_the_probe_starts_as_the_training_does(tiny_folder, photos, tmp_path, monkeypatch):
    from rite_diffusion.training import probe

    monkeypatch.setattr(probe, "STEPS", 1)
    starts = []
    monkeypatch.setattr(probe, "start_pairs", lambda job: starts.append(job.config.lora.init))
    settings = {"base": str(tiny_folder), "lora": {"init": "lora_one"}, "optim": {"lr": "auto"}}
    train(photos, tmp_path, **settings, previews={"every": 0}, steps=1)
    assert starts == ["lora_one"] * 5


BAD = {
    "file": ({"lora": {"init": "pissa", "init_from": "a.safetensors"}}, "both say where"),
    "dora": ({"lora": {"init": "pissa", "kind": "dora"}}, "for lora.kind = lora or rslora"),
    "dora by gradient": ({"lora": {"init": "lora_one", "kind": "dora"}}, "for lora.kind = lora"),
    "whole matrices": (
        {"lora": {"init": "lora_one"}, "method": "custom_diffusion"},
        "set custom_diffusion.weights = lora",
    ),
    "embeddings first": (
        {"lora": {"init": "lora_one"}, "method": "pivotal", "tokens": {"first": 2}},
        "tokens.first = 0",
    ),
    "quantised": (
        {"lora": {"init": "pissa"}, "memory": {"weights": "int8"}},
        "lora.init = pissa reads the base's weights",
    ),
    "quantised encoder": (
        {"lora": {"init": "pissa"}, "memory": {"encoder_weights": "int8"}},
        "lora.init = pissa reads the base's weights",
    ),
    "unknown": ({"lora": {"init": "eva"}}, r"lora\.init"),
    "size": ({"lora": {"init_size": 0.0}}, r"lora\.init_size"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_start_so_is_refused_before_anything_is_written(photos, tmp_path, case):
    settings, message = BAD[case]
    with pytest.raises(RiteError, match=message):
        train(photos, tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


def test_several_processes_are_refused(photos, tmp_path, monkeypatch):
    from rite_diffusion.training import first_gradient

    monkeypatch.setattr(first_gradient, "process_count", lambda: 2)
    with pytest.raises(ConfigError, match="needs one process"):
        train(photos, tmp_path / "run", lora={"init": "lora_one"})


def test_a_loss_that_does_not_reach_the_pairs_is_refused(base):
    lora = Lora(base, rank=2)
    with pytest.raises(RiteError, match="no gradient reaches"):
        lora.follow_gradient(lambda: torch.ones(1, requires_grad=True).sum().backward(), 0.1)
    lora.remove()
