"""The LoRA-aware optimizers against slow references and peers, and what they do not depend on."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_riemannian_optimizer
from torch import nn
from torch.nn import functional as F

from factors import ADAM, FAST, Factors
from reference import lora_optimizers as reference
from rite_diffusion.optim import (
    LoraMuon,
    LoraRite,
    ScaledAdamW,
    ScaledSGD,
    lora_param_groups,
)

SLOW = {
    "lora_muon": reference.lora_muon,
    "scaled_sgd": reference.scaled_sgd,
    "scaled_adamw": reference.scaled_adamw,
    "rite": reference.rite,
}
OPTIONS = {
    "lora_muon": {"lr": 0.05, "weight_decay": 0.1, "momentum": 0.8, "sign_eps": 1e-2},
    "scaled_sgd": {"lr": 0.01, "damping": 1e-3, "momentum": 0.5, "weight_decay": 0.1},
    "scaled_adamw": {"lr": 0.01, "damping": 1e-3, "weight_decay": 0.1},
    "rite": {"lr": 0.01, "weight_decay": 0.1},
}


def run_reference(model, rule, steps, options):
    """Fit the same targets with a slow rule; returns the pairs."""
    pairs = [reference.Pair(down.detach(), up.detach()) for down, up in model.pairs()]
    for _ in range(steps):
        gradients = []
        for pair, target in zip(pairs, model.targets, strict=True):
            error = 2 * (pair.product - target) / target.numel()
            gradients.append((pair.up.T @ error, error @ pair.down.T))
        rule(pairs, gradients, **options)
    return pairs


def assert_equal_to_reference(name, model, steps, options, tolerance=1e-9):
    expected = run_reference(model, SLOW[name], steps, options)
    model.run(FAST[name](lora_param_groups(model), **options), steps)
    for (down, up), pair in zip(model.pairs(), expected, strict=True):
        torch.testing.assert_close(
            down.detach().double(), pair.down, rtol=tolerance, atol=tolerance
        )
        torch.testing.assert_close(up.detach().double(), pair.up, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", FAST)
def test_equals_the_literal_rule_over_many_steps(name):
    model = Factors([(12, 9), (12, 9), (7, 20), (12, 9), (5, 5)], rank=3)
    assert_equal_to_reference(name, model, 50, OPTIONS[name])


@pytest.mark.parametrize(
    "options",
    [
        {"escape": True},
        {"clip_unmagnified": 0.0},
        {"clip_unmagnified": 1e-3},
        {"skip_rms": 1e-2},
        {"betas": (0.5, 0.8), "eps": 1e-4},
    ],
    ids=str,
)
def test_rite_options_equal_the_literal_rule(options):
    assert_equal_to_reference(
        "rite", Factors([(8, 6), (8, 6), (6, 11)], rank=4), 30, {"lr": 0.02} | options
    )


WEAK = {
    "no down": lambda down, up: down.zero_(),
    "a lost row of down": lambda down, up: down[1].zero_(),
    "a small row of down": lambda down, up: down[1].mul_(1e-5),
    "a small column of up": lambda down, up: up[:, 0].mul_(1e-5),
    "both small": lambda down, up: (down[1].mul_(1e-3), up[:, 1].mul_(1e-3)),
    "small as a step": lambda down, up: (down.mul_(0.1), up.mul_(0.1)),
}


@pytest.mark.parametrize("damping", [0.3, 1.0])
@pytest.mark.parametrize("case", WEAK)
@pytest.mark.parametrize("name", ["rite", "lora_muon"])
def test_steps_in_weak_directions_equal_the_literal_rule(name, case, damping):
    model = Factors([(8, 6), (8, 6), (6, 11)], rank=4)
    with torch.no_grad():
        for down, up in model.pairs():
            WEAK[case](down, up)
    options = {"lr": 0.02, "core_damping": damping}
    assert_equal_to_reference(name, model, 10, options, tolerance=1e-7)


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(sorted(FAST)),
    shapes=st.lists(st.tuples(st.integers(4, 12), st.integers(4, 12)), min_size=1, max_size=4),
    rank=st.integers(1, 4),
    zero_up=st.booleans(),
)
def test_any_shapes_and_ranks_equal_the_literal_rule(name, shapes, rank, zero_up):
    options = {"lr": 1e-2} | ({"damping": 1e-2} if name.startswith("scaled") else {})
    model = Factors(shapes, rank, zero_up=zero_up)
    assert_equal_to_reference(name, model, 8, options, tolerance=1e-7)


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_scaled_equals_peft_riemannian(base):
    ours, theirs = peft_model(), peft_model()
    options = {"lr": 0.01, "weight_decay": 0.0}
    damping = 1e-2
    rule = ScaledSGD if base is torch.optim.SGD else ScaledAdamW
    fit_peft(ours, rule(lora_param_groups(ours), damping=damping, **options), 30)
    fit_peft(theirs, create_riemannian_optimizer(theirs, base, reg=damping, **options), 30)
    assert_same_parameters(ours, theirs, 1e-10)


def test_rite_equals_pytorch_optimizer():
    """Where its global clipping is idle; else both clip, but theirs divides the norm's zero too."""
    peer = pytest.importorskip("pytorch_optimizer")
    ours, theirs = peft_model(), peft_model()
    options = {"lr": 0.01, "core_damping": 0.0}  # theirs has none
    fit_peft(ours, LoraRite(lora_param_groups(ours), **options), 30)
    factors = [p for n, p in theirs.named_parameters() if p.requires_grad]
    fit_peft(theirs, peer.LoRARite(factors, lr=0.01), 30)
    assert_same_parameters(ours, theirs, 1e-9)


def peft_model():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(10, 16, bias=False), nn.Tanh(), nn.Linear(16, 10, bias=False))
    config = LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights=False)
    model = get_peft_model(net, config).double()
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return model


def fit_peft(model, optimizer, steps):
    x = torch.randn(32, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for _ in range(steps):
        optimizer.zero_grad()
        F.mse_loss(model(x), x.flip(1)).backward()
        optimizer.step()


def assert_same_parameters(ours, theirs, tolerance):
    assert any(p.requires_grad for p in ours.parameters())
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def trajectory(optimizer_class, transform, steps=25, **options):
    """Products over time from factors (up Q, Q^-1 down) where transform(r) gives Q."""
    model = Factors([(12, 9), (12, 9), (7, 20)], rank=3)
    with torch.no_grad():
        for down, up in model.pairs():
            q = transform(down.shape[0])
            up.copy_(up @ q)
            down.copy_(torch.linalg.solve(q, down))
    optimizer = optimizer_class(lora_param_groups(model), **options)
    products = []
    for _ in range(steps):
        model.run(optimizer, 1)
        products.append(torch.cat([p.flatten() for p in model.products()]))
    return torch.stack(products)


def ill_conditioned(rank):
    generator = torch.Generator().manual_seed(7)
    left, right = (
        torch.linalg.qr(torch.randn(rank, rank, dtype=torch.float64, generator=generator))[0]
        for _ in range(2)
    )
    return left @ torch.diag(torch.logspace(-1.5, 1.5, rank, dtype=torch.float64)) @ right


TRANSFORMS = {
    "condition 1000": ill_conditioned,
    "times 1000": lambda rank: 1e3 * torch.eye(rank, dtype=torch.float64),
    "by 1000": lambda rank: 1e-3 * torch.eye(rank, dtype=torch.float64),
}
INVARIANT = {
    "lora_muon": (LoraMuon, {"lr": 0.1, "weight_decay": 0.1}),
    "rite": (LoraRite, {"lr": 0.02}),
    "rite, escape": (LoraRite, {"lr": 0.02, "escape": True}),
    "scaled_sgd": (ScaledSGD, {"lr": 0.1, "damping": 0.0}),
}


def deviation(rule, options, transform):
    plain = trajectory(rule, lambda rank: torch.eye(rank, dtype=torch.float64), **options)
    changed = trajectory(rule, transform, **options)
    moved = (plain[-1] - plain[0]).norm()
    assert moved > 0.05 * plain[0].norm()  # the steps do something
    return ((changed - plain).norm(dim=1) / plain.norm(dim=1)).max().item()


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", INVARIANT)
def test_products_do_not_depend_on_the_factors(name, transform):
    assert deviation(*INVARIANT[name], TRANSFORMS[transform]) < 1e-8


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_adamw_depends_on_the_factors(transform):
    assert deviation(ADAM, {"lr": 0.02}, TRANSFORMS[transform]) > 1e-2


def test_scaled_adamw_depends_on_a_mixing_of_factors():
    options = {"lr": 0.02, "damping": 1e-12}
    assert deviation(ScaledAdamW, options, ill_conditioned) > 1e-2
