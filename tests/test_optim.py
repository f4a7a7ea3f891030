"""What the LoRA-aware optimizers promise of states, groups and bad input."""

import copy
import io
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from factors import ADAM, FAST, Factors
from rite_diffusion.errors import OptimizerError
from rite_diffusion.optim import OPTIMIZERS, LoraRite, ScaledAdamW, ScaledSGD, lora_param_groups


def test_rite_state_is_half_of_adamws():
    def size(optimizer):
        states = optimizer.state_dict()["state"].values()
        return sum(v.numel() * v.element_size() for s in states for v in s.values())

    model = Factors([(320, 320), (640, 320)], rank=8, dtype=torch.float32)
    sizes = [
        size(model.run(o, 1) and o)
        for o in (LoraRite(lora_param_groups(model)), ADAM(model.parameters()))
    ]
    assert sizes[0] < 0.6 * sizes[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_resume_bit_for_bit(name, dtype):
    spec = OPTIMIZERS[name]

    def make(model):
        groups = [group | {"lr": 0.01} for group in lora_param_groups(model)]
        return spec.build(groups)

    model = Factors([(12, 9), (12, 9), (7, 20)], rank=3, dtype=dtype)
    optimizer = make(model)
    model.run(optimizer, 5)
    saved = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), saved)
    saved.seek(0)
    weights, state = torch.load(saved, weights_only=True)
    fresh = Factors([(12, 9), (12, 9), (7, 20)], rank=3, dtype=dtype)
    fresh.load_state_dict(weights)
    again = make(fresh)
    again.load_state_dict(state)
    model.run(optimizer, 5)
    fresh.run(again, 5)
    for a, b in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", FAST)
def test_a_copied_optimizer_continues_identically(name):
    model = Factors([(12, 9)], rank=3)
    optimizer = FAST[name](lora_param_groups(model), lr=0.01)
    model.run(optimizer, 3)
    other, again = copy.deepcopy((model, optimizer))
    model.run(optimizer, 3)
    other.run(again, 3)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_loading_state_of_other_parameters_is_refused():
    small, large = Factors([(12, 9)], rank=3), Factors([(12, 9), (12, 9)], rank=3)
    state = LoraRite(lora_param_groups(small)).state_dict()
    with pytest.raises(OptimizerError, match="layer1"):
        LoraRite(lora_param_groups(large)).load_state_dict(state)


@pytest.mark.parametrize("name", FAST)
def test_pairs_without_gradient_do_not_move(name):
    model = Factors([(12, 9), (12, 9), (12, 9)], rank=3)
    optimizer = FAST[name](lora_param_groups(model), lr=0.01)
    model.run(optimizer, 2)
    before = [up.detach().clone() for _, up in model.pairs()]
    optimizer.zero_grad()
    for index, (down, up) in enumerate(model.pairs()):
        if index != 1:
            (up @ down).square().sum().backward()
    optimizer.step()
    moved = [not torch.equal(up, old) for (_, up), old in zip(model.pairs(), before, strict=True)]
    assert moved == [True, False, True]
    model.run(optimizer, 2)
    state = optimizer.state_dict()["state"]
    names = optimizer.param_groups[0]["param_names"]
    steps = {n.split(".")[0]: int(state[i]["step"]) for i, n in enumerate(names)}
    assert steps == {"layer0": 5, "layer1": 4, "layer2": 5}


@pytest.mark.parametrize("name", FAST)
def test_parameters_outside_pairs_follow_adamw(name):
    model, twin = Factors([(12, 9)], rank=3), Factors([(12, 9)], rank=3)
    groups = lora_param_groups(model, lr_other=0.05, weight_decay_other=0.1)
    model.run(FAST[name](groups, lr=1e-3), 10)
    twin.run(ADAM([twin.bias], lr=0.05, weight_decay=0.1), 10)
    tolerance = 1e-5 if name == "rite" else 1e-12  # rite's eps is 1e-6
    torch.testing.assert_close(model.bias, twin.bias, rtol=tolerance, atol=tolerance)


def grouped(model, kind, lr):
    """The parameters of a model as one group, or as two; with a rate or without one."""
    named = list(model.named_parameters())
    if kind == "one list":
        return named
    if kind == "one group":
        return [{"params": iter(named), "lr": lr, "name": "unet"}]
    return lora_param_groups(model)


@pytest.mark.parametrize("kind", ["one list", "one group", "two groups"])
@pytest.mark.parametrize("name", FAST)
def test_parameters_outside_pairs_have_a_rate_of_their_own(name, kind):
    model = Factors([(12, 9)], rank=3)
    optimizer = FAST[name](grouped(model, kind, 0.3), lr=0.3, lr_other=2e-3)
    rates = {n: g["lr"] for g in optimizer.param_groups for n in g["param_names"]}
    assert rates == {"layer0.lora_A": 0.3, "layer0.lora_B": 0.3, "bias": 2e-3}
    assert {g.get("name") for g in optimizer.param_groups} == {"unet" if "e g" in kind else None}
    stated = FAST[name](lora_param_groups(model, lr_other=0.05), lr=0.3, lr_other=2e-3)
    assert stated.param_groups[1]["lr"] == 0.05


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("kind", ["one list", "one group", "two groups"])
def test_parameters_outside_pairs_do_not_leap_at_the_default_rates(name, kind):
    model = Factors([(12, 9)], rank=3)
    lr = OPTIMIZERS[name].lr
    rule = FAST[name](grouped(model, kind, lr), lr=lr)
    model.run(rule, 1)
    assert 0 < model.bias.detach().abs().max() < 4e-3  # AdamW's first step is its rate


def test_a_schedule_acts_on_parameters_outside_pairs():
    model = Factors([(12, 9)], rank=3)
    optimizer = ScaledSGD(model.named_parameters(), lr=0.3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    model.run(optimizer, 1)
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.15, 5e-4]


@pytest.mark.parametrize("name", FAST)
def test_convolutions_are_optimized_as_pairs(name):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Conv2d(6, 4, 1))
    model = get_peft_model(net, LoraConfig(r=2, target_modules=["0", "1"]))
    optimizer = FAST[name](lora_param_groups(model), lr=1e-2)
    x = torch.randn(2, 4, 8, 8)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (model(x) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_layer_narrower_than_the_rank_learns(name):
    torch.manual_seed(0)
    model = Factors([(3, 20)], rank=8)
    optimizer = OPTIMIZERS[name].make(
        [{"params": list(model.named_parameters()), "lr": OPTIMIZERS[name].lr}]
    )
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = model.loss()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and all(p.isfinite().all() for p in model.parameters())


def test_lora_plus_sets_the_rate_of_up():
    model = Factors([(12, 9)], rank=3)
    groups = [group | {"lr": 1e-3} for group in lora_param_groups(model)]
    optimizer = OPTIMIZERS["adamw_plus"].build(groups, ratio=8.0)
    rates = {name: g["lr"] for g in optimizer.param_groups for name in g["param_names"]}
    assert rates == {"layer0.lora_A": 1e-3, "layer0.lora_B": 8e-3, "bias": 1e-3}
    reference_model = Factors([(12, 9)], rank=3)
    (down, up), bias = reference_model.pairs()[0], reference_model.bias
    usual = OPTIMIZERS["adamw_plus"].build(lora_param_groups(Factors([(12, 9)], rank=3)))
    assert sorted(group["lr"] for group in usual.param_groups) == [5e-4, 5e-4, 8e-3]
    plain = ADAM([{"params": [down, bias], "lr": 1e-3}, {"params": [up], "lr": 8e-3}])
    model.run(optimizer, 5)
    reference_model.run(plain, 5)
    for a, b in zip(model.parameters(), reference_model.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_closures_schedules_and_accumulation_work():
    model = Factors([(12, 9)], rank=3)
    optimizer = LoraRite(lora_param_groups(model), lr=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step == 0 else 0.0)

    def closure():
        optimizer.zero_grad()
        for _ in range(2):  # accumulates
            (model.loss() / 2).backward()
        return model.loss()

    first = optimizer.step(closure).item()
    schedule.step()
    moved = [p.detach().clone() for p in model.parameters()]
    assert optimizer.step(closure).item() < first
    assert all(torch.equal(a, b) for a, b in zip(moved, model.parameters(), strict=True))


def _frozen(model):
    model.layer0["lora_A"].requires_grad_(False)
    return lora_param_groups(model)


def _with_gradient(value):
    def step(model):
        optimizer = LoraRite(lora_param_groups(model))
        model.loss().backward()
        model.layer1["lora_B"].grad[0, 0] = value
        optimizer.step()

    return step


def _sparse(model):
    optimizer = LoraRite(lora_param_groups(model))
    model.loss().backward()
    model.bias.grad = None
    model.layer1["lora_B"].grad = model.layer1["lora_B"].grad.to_sparse()
    optimizer.step()


def test_rite_says_once_that_it_leaves_large_gradients_out():
    def moved_by(factor, **options):
        model = Factors([(12, 9), (12, 9)], rank=3)
        optimizer = LoraRite(lora_param_groups(model), lr=0.02, **options)
        for _ in range(10):
            optimizer.zero_grad()
            (model.loss() * factor).backward()
            optimizer.step()
        moved = zip(model.products(), start.products(), strict=True)
        return sum((new - old).norm().item() for new, old in moved)

    start = Factors([(12, 9), (12, 9)], rank=3)
    with pytest.warns(UserWarning, match="layer0: an unmagnified gradient .* skip_rms") as caught:
        assert moved_by(1e6) == 0
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert moved_by(1.0) == pytest.approx(moved_by(1e6, skip_rms=0.0), rel=0.05)


BAD = {
    "unpaired": (
        lambda m: LoraRite([(n, p) for n, p in m.named_parameters() if n != "layer1.lora_B"]),
        "layer1: only the LoRA factor 'down'",
    ),
    "frozen": (lambda m: LoraRite(_frozen(m)), "layer0: the LoRA factor 'down' is frozen"),
    "no LoRA": (lambda m: lora_param_groups(nn.Linear(2, 2)), "no trainable LoRA factors"),
    "nameless": (lambda m: LoraRite(m.parameters()), "named_parameters"),
    "negative rate": (lambda m: LoraRite(lora_param_groups(m), lr=-1.0), "lr = -1.0"),
    "NaN rate": (lambda m: LoraRite(lora_param_groups(m), lr=float("nan")), "lr = nan"),
    "negative group rate": (
        lambda m: ScaledAdamW([g | {"lr": -1.0} for g in lora_param_groups(m)]),
        "lr = -1.0",
    ),
    "other rate": (lambda m: ScaledSGD(lora_param_groups(m), lr_other=-1.0), "lr_other = -1.0"),
    "beta": (lambda m: LoraRite(lora_param_groups(m), betas=(0.9, 1.0)), "betas"),
    "damping": (lambda m: ScaledSGD(lora_param_groups(m), damping=-1e-3), "damping"),
    "NaN gradient": (_with_gradient(float("nan")), "layer1: its gradient has NaN"),
    "infinite gradient": (_with_gradient(float("inf")), "layer1: its gradient has NaN"),
    "sparse gradient": (_sparse, "layer1: its gradient is sparse"),
    "option": (
        lambda m: OPTIMIZERS["rite"].build(lora_param_groups(m), dampin=1.0),
        "no option 'dampin'",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_invalid_optimizer_input_is_refused_without_a_step(case):
    model = Factors([(12, 9), (12, 9)], rank=3)
    before = copy.deepcopy(model.state_dict())
    act, message = BAD[case]
    with pytest.raises(OptimizerError, match=message):
        act(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_operations_do_not_grow_with_the_number_of_pairs():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            Count.calls += 1
            return function(*args, **(kwargs or {}))

    def calls(pairs, rule):
        model = Factors([(12, 9)] * pairs, rank=3, dtype=torch.float32)
        optimizer = rule(lora_param_groups(model))
        model.run(optimizer, 2)
        model.loss().backward()
        Count.calls = 0
        with Count():
            optimizer.step()
        return (
            Count.calls - 4 * pairs
        )  # reading each parameter: two detach, two views of the result

    for rule in FAST.values():
        assert calls(20, rule) <= calls(3, rule)
