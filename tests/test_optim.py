"""The LoRA-aware optimizers against slow references, their peers, and what they promise."""

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_riemannian_optimizer
from torch import nn
from torch.nn import functional as F

from reference import lora_optimizers as reference
from rite_diffusion.errors import OptimizerError
from rite_diffusion.optim import OPTIMIZERS, LoraRite, ScaledAdamW, ScaledSGD, lora_param_groups

FAST = {"scaled_sgd": ScaledSGD, "scaled_adamw": ScaledAdamW, "rite": LoraRite}
SLOW = {
    "scaled_sgd": reference.scaled_sgd,
    "scaled_adamw": reference.scaled_adamw,
    "rite": reference.rite,
}
OPTIONS = {
    "scaled_sgd": {"lr": 0.01, "damping": 1e-3, "momentum": 0.5, "weight_decay": 0.1},
    "scaled_adamw": {"lr": 0.01, "damping": 1e-3, "weight_decay": 0.1},
    "rite": {"lr": 0.01, "weight_decay": 0.1},
}


class Factors(nn.Module):
    """LoRA pairs of given (out, in) shapes and one bias, to be fitted to random targets."""

    def __init__(self, shapes, rank, dtype=torch.float64, zero_up=False):
        super().__init__()
        torch.manual_seed(0)
        for index, (rows, columns) in enumerate(shapes):
            down = torch.randn(rank, columns, dtype=torch.float64) / columns**0.5
            up = torch.randn(rows, rank, dtype=torch.float64) / rank**0.5
            pair = nn.ParameterDict({"lora_A": down, "lora_B": up * (not zero_up)})
            self.add_module(f"layer{index}", pair.to(dtype))
        self.bias = nn.Parameter(torch.zeros(3, dtype=dtype))
        self.targets = [torch.randn(shape, dtype=torch.float64) for shape in shapes]

    def pairs(self):
        layers = [m for m in self.children() if isinstance(m, nn.ParameterDict)]
        return [(layer["lora_A"], layer["lora_B"]) for layer in layers]

    def products(self):
        return [(up.detach() @ down.detach()).double() for down, up in self.pairs()]

    def loss(self):
        fit = [
            F.mse_loss(up @ down, target.to(up.dtype))
            for (down, up), target in zip(self.pairs(), self.targets, strict=True)
        ]
        return sum(fit) + (self.bias - 1).square().sum()

    def run(self, optimizer, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            self.loss().backward()
            optimizer.step()
        return self


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


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(sorted(FAST)),
    shapes=st.lists(st.tuples(st.integers(4, 12), st.integers(4, 12)), min_size=1, max_size=4),
    rank=st.integers(1, 4),
    zero_up=st.booleans(),
)
def test_any_shapes_and_ranks_equal_the_literal_rule(name, shapes, rank, zero_up):
    options = {"lr": 1e-2} | ({"damping": 1e-2} if name != "rite" else {})
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
    fit_peft(ours, LoraRite(lora_param_groups(ours), lr=0.01), 30)
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
ADAM = torch.optim.AdamW
INVARIANT = {
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FAST)
def test_a_fresh_adapter_starts(name, dtype):
    model = Factors([(12, 9), (12, 9)], rank=3, dtype=dtype, zero_up=True)
    start = [down.detach().clone() for down, _ in model.pairs()]
    optimizer = FAST[name](lora_param_groups(model), lr=0.02)
    model.run(optimizer, 1)
    for (down, up), before in zip(model.pairs(), start, strict=True):
        assert torch.equal(down, before) or name != "rite"
        assert up.abs().max() > 0
    first = model.loss().item()
    model.run(optimizer, 20)
    assert all(p.isfinite().all() for p in model.parameters())
    assert model.loss().item() < first
    assert all(
        v.dtype == torch.float32
        for stack in optimizer._stacks
        for s in stack.state
        for v in s.values()
    )


@pytest.mark.parametrize("name", FAST)
def test_rank_deficient_factors_stay_finite(name):
    model = Factors([(12, 9), (12, 9)], rank=4, dtype=torch.float32)
    with torch.no_grad():
        (down, up), (down2, _) = model.pairs()
        up[:, 1] = up[:, 0]
        down[2] = 0
        down2.copy_(down2[:1].expand_as(down2))
    model.run(FAST[name](lora_param_groups(model), lr=1e-3), 20)
    assert all(p.isfinite().all() and p.abs().max() < 1e3 for p in model.parameters())


def nearly_deficient(dtype, share):
    """Pairs of rank 8 whose last four directions nearly depend on the first four."""
    model = Factors([(24, 40), (40, 24)], rank=8)
    with torch.no_grad():
        for down, up in model.pairs():
            mixing = torch.randn(2, 4, 4, dtype=up.dtype)
            up[:, 4:] = up[:, :4] @ mixing[0] + share * up[:, 4:]
            down[4:] = mixing[1] @ down[:4] + share * down[4:]
    return model.to(dtype)


@pytest.mark.parametrize("share", [1e-1, 1e-2])
def test_rites_rounding_stays_small_where_factors_are_ill_conditioned(share):
    exact, rounded = nearly_deficient(torch.float64, share), nearly_deficient(torch.float32, share)
    for model in (exact, rounded):
        model.run(LoraRite(lora_param_groups(model), lr=1e-3), steps=100)
    for one, other in zip(rounded.products(), exact.products(), strict=True):
        assert (one - other).norm() < 1e-3 * other.norm()


@pytest.mark.parametrize("lr", [1e-3, 1e-2])
@pytest.mark.parametrize("share", [1e-3, 1e-4, 1e-5])
def test_rite_is_steady_where_factors_are_nearly_deficient(share, lr):
    # To the letter, both factors' steps meet in the lost directions: products of 100 and more
    model = nearly_deficient(torch.float32, share)
    before = model.loss().item()
    model.run(LoraRite(lora_param_groups(model), lr=lr), steps=100)
    assert model.loss().item() < before
    for product, target in zip(model.products(), model.targets, strict=True):
        assert product.norm() < target.norm()


def test_rite_keeps_half_of_adamws_state():
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
def test_resumes_bit_for_bit(name, dtype):
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
def test_a_copied_optimizer_goes_on_alike(name):
    model = Factors([(12, 9)], rank=3)
    optimizer = FAST[name](lora_param_groups(model), lr=0.01)
    model.run(optimizer, 3)
    other, again = copy.deepcopy((model, optimizer))
    model.run(optimizer, 3)
    other.run(again, 3)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_state_of_other_parameters_is_refused():
    small, large = Factors([(12, 9)], rank=3), Factors([(12, 9), (12, 9)], rank=3)
    state = LoraRite(lora_param_groups(small)).state_dict()
    with pytest.raises(OptimizerError, match="layer1"):
        LoraRite(lora_param_groups(large)).load_state_dict(state)


@pytest.mark.parametrize("name", FAST)
def test_pairs_without_gradient_rest(name):
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
def test_other_parameters_move_as_adamw_moves_them(name):
    model, twin = Factors([(12, 9)], rank=3), Factors([(12, 9)], rank=3)
    groups = lora_param_groups(model, lr_other=0.05, weight_decay_other=0.1)
    model.run(FAST[name](groups, lr=1e-3), 10)
    twin.run(ADAM([twin.bias], lr=0.05, weight_decay=0.1), 10)
    tolerance = 1e-5 if name == "rite" else 1e-12  # rite's eps is 1e-6
    torch.testing.assert_close(model.bias, twin.bias, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", FAST)
def test_convolutions_are_pairs_too(name):
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


def test_lora_plus_gives_up_its_own_rate():
    model = Factors([(12, 9)], rank=3)
    groups = [group | {"lr": 1e-3} for group in lora_param_groups(model)]
    optimizer = OPTIMIZERS["adamw_plus"].build(groups, ratio=8.0)
    rates = {name: g["lr"] for g in optimizer.param_groups for name in g["param_names"]}
    assert rates == {"layer0.lora_A": 1e-3, "layer0.lora_B": 8e-3, "bias": 1e-3}
    reference_model = Factors([(12, 9)], rank=3)
    (down, up), bias = reference_model.pairs()[0], reference_model.bias
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
def test_bad_input_is_named_and_changes_nothing(case):
    model = Factors([(12, 9), (12, 9)], rank=3)
    before = copy.deepcopy(model.state_dict())
    act, message = BAD[case]
    with pytest.raises(OptimizerError, match=message):
        act(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("rule", [ScaledSGD, ScaledAdamW])
def test_no_damping_needs_full_rank(rule):
    model = Factors([(12, 9), (12, 9)], rank=3)
    with torch.no_grad():
        model.layer1["lora_B"].zero_()
    optimizer = rule(lora_param_groups(model), damping=0.0)
    with pytest.raises(OptimizerError, match="layer1: a LoRA factor is rank deficient"):
        model.run(optimizer, 1)


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
