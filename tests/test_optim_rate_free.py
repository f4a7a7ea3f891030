"""Prodigy and schedule-free AdamW: equality with their authors' code, and in trainings."""

import pytest
import torch
from prodigyopt import Prodigy as ReleasedProdigy
from safetensors.torch import load_file
from schedulefree import AdamWScheduleFree

from factors import ADAM, Factors
from rite_diffusion.adapters import load_adapter
from rite_diffusion.errors import ConfigError, OptimizerError
from rite_diffusion.optim import OPTIMIZERS, Prodigy, ScheduleFreeAdamW, lora_param_groups
from rite_diffusion.training.settings import configure
from runs import Stop, crash_at, same_run, train

SHAPES = [(12, 9), (7, 12)]
RELEASED = {"use_bias_correction": False, "safeguard_warmup": False}
ON = {"use_bias_correction": True, "safeguard_warmup": True}
PRODIGY = {
    "as released": RELEASED,
    "by default": ON,
    "coefficient": ON | {"d_coef": 2.0, "d0": 1e-4},
    "growth": RELEASED | {"growth_rate": 1.05, "d0": 1e-3},
    "decay": ON | {"weight_decay": 0.05},
    "other moments": ON | {"betas": (0.95, 0.99), "beta3": 0.9, "eps": 1e-6},
}
SCHEDULE_FREE = {
    "default": {},
    "powers": {"r": 1.0, "weight_lr_power": 1.0},
    "others": {"betas": (0.95, 0.99), "weight_decay": 0.1, "lr": 0.02},
}


def close(model, other):
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)


def warmed(model, optimizer, peak, steps, warmup=5):
    """Train with a rate that rises in the first steps."""
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = peak * min(1.0, (step + 1) / warmup)
        model.run(optimizer, 1)


@pytest.mark.parametrize("case", PRODIGY)
def test_prodigy_is_its_authors(case, capsys):
    ours, theirs = Factors(SHAPES, rank=3), Factors(SHAPES, rank=3)
    one = Prodigy(ours.parameters(), **PRODIGY[case])
    other = ReleasedProdigy(theirs.parameters(), **PRODIGY[case])
    for _ in range(8):
        warmed(ours, one, 1.0, 10)
        warmed(theirs, other, 1.0, 10)
        close(ours, theirs)
        assert one.distances() == pytest.approx([other.param_groups[0]["d"]], rel=1e-9)
    assert one.distances()[0] > 10 * one.param_groups[0]["d0"]


def test_each_group_has_a_distance_of_its_own():
    models = [Factors(SHAPES, rank=3) for _ in range(3)]
    for model in (models[0], models[2]):
        for down, up in model.pairs():
            down.data *= 5
            up.data *= 5
    alone = [Prodigy(model.parameters(), d0=1e-3) for model in models[:2]]
    for model, optimizer in zip(models[:2], alone, strict=True):
        model.run(optimizer, 40)
    twin = Factors(SHAPES, rank=3)
    together = Prodigy([{"params": list(m.parameters())} for m in (models[2], twin)], d0=1e-3)
    for _ in range(40):
        together.zero_grad()
        (models[2].loss() + twin.loss()).backward()
        together.step()
    close(models[0], models[2])
    close(models[1], twin)
    assert together.distances() == [each.distances()[0] for each in alone]
    assert together.distances()[0] != together.distances()[1]


def test_a_group_may_keep_its_rate_and_is_adamws():
    ours, theirs = Factors(SHAPES, rank=3), Factors(SHAPES, rank=3)
    group = {"params": list(ours.parameters()), "lr": 1e-3, "rate_free": False}
    one = Prodigy([group], d_coef=2.0, **RELEASED)
    ours.run(one, 30)
    theirs.run(ADAM(theirs.parameters(), lr=1e-3, weight_decay=0.0), 30)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    assert one.distances() == [1.0]


def test_prodigy_finds_a_rate_that_fits_lora_pairs():
    """From 1e-6, in as many steps as a short training has, whatever the scale of the loss."""
    found = []
    for scale in (1.0, 1e-3):
        model = Factors(SHAPES, rank=3, dtype=torch.float32, zero_up=True)
        optimizer = OPTIMIZERS["prodigy"].build([g | {"lr": 1.0} for g in lora_param_groups(model)])
        for _ in range(100):
            optimizer.zero_grad()
            (scale * model.loss()).backward()
            optimizer.step()
        found.append(model.loss().item())
    best = min(adams(rate) for rate in (1e-3, 1e-2, 1e-1))
    start = Factors(SHAPES, rank=3, dtype=torch.float32, zero_up=True).loss().item()
    assert max(found) < best + 0.2 * (start - best)
    assert found[0] == pytest.approx(found[1], rel=1e-2)


def adams(rate):
    model = Factors(SHAPES, rank=3, dtype=torch.float32, zero_up=True)
    return model.run(ADAM(model.parameters(), lr=rate, weight_decay=0.0), 100).loss().item()


@pytest.mark.parametrize("case", SCHEDULE_FREE)
def test_schedule_free_is_its_authors(case):
    ours, theirs = Factors(SHAPES, rank=3), Factors(SHAPES, rank=3)
    settings = {"lr": 5e-3} | SCHEDULE_FREE[case]
    one = ScheduleFreeAdamW(ours.parameters(), **settings)
    other = AdamWScheduleFree(theirs.parameters(), **settings)
    other.train()
    for _ in range(4):
        warmed(ours, one, settings["lr"], 10)
        warmed(theirs, other, settings["lr"], 10)
        close(ours, theirs)
        before = [p.detach().clone() for p in ours.parameters()]
        one.eval()
        other.eval()
        close(ours, theirs)
        assert one.is_averaged
        one.train()
        other.train()
        assert all(torch.equal(p, b) for p, b in zip(ours.parameters(), before, strict=True))


def test_the_result_is_the_average_of_the_steps():
    """By the paper's Algorithm 1, written out: z, x and y of one parameter."""
    start = torch.tensor([1.0, -2.0], dtype=torch.float64)
    parameter = torch.nn.Parameter(start.clone())
    optimizer = ScheduleFreeAdamW([parameter], lr=0.1, betas=(0.9, 0.5), eps=0.0)
    z, x, second = start.clone(), start.clone(), torch.zeros(2, dtype=torch.float64)
    for step in range(1, 8):
        y = 0.1 * z + 0.9 * x
        torch.testing.assert_close(parameter.detach(), y)
        optimizer.zero_grad()
        (parameter**3).sum().backward()
        optimizer.step()
        gradient = 3 * y**2
        second = 0.5 * second + 0.5 * gradient**2
        z = z - 0.1 * gradient / (second / (1 - 0.5**step)).sqrt()
        x = (1 - 1 / step) * x + z / step
    optimizer.eval()
    torch.testing.assert_close(parameter.detach(), x)


def test_a_step_on_the_average_is_refused():
    model = Factors(SHAPES, rank=3)
    optimizer = ScheduleFreeAdamW(model.parameters())
    model.run(optimizer, 2)
    optimizer.eval()
    with pytest.raises(OptimizerError, match=r"call the optimizer's train\(\)"):
        model.run(optimizer, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [Prodigy, ScheduleFreeAdamW])
@pytest.mark.parametrize("on_average", [False, True])
def test_a_saved_state_goes_on_bit_for_bit(make, dtype, on_average):
    whole, parts = (Factors(SHAPES, rank=3, dtype=dtype) for _ in range(2))
    one = make(lora_param_groups(whole))
    whole.run(one, 20)
    first = make(lora_param_groups(parts))
    parts.run(first, 10)
    if on_average and make is ScheduleFreeAdamW:
        first.eval()
    state = first.state_dict()
    kept = [each for own in state["state"].values() for each in own.items()]
    assert all(value.dtype != torch.bfloat16 or key == "y" for key, value in kept)
    second = make(lora_param_groups(parts))
    second.load_state_dict(state)
    if on_average and make is ScheduleFreeAdamW:
        second.train()
    parts.run(second, 10)
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("make", [Prodigy, ScheduleFreeAdamW])
def test_a_parameter_without_gradient_rests(make):
    model = Factors(SHAPES, rank=3)
    model.bias.requires_grad_(False)
    before = model.bias.detach().clone()
    model.run(make(model.parameters(), weight_decay=0.1), 5)
    assert torch.equal(model.bias, before)


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (Prodigy, {"d0": 0.0}, "d0 = 0.0"),
        (Prodigy, {"growth_rate": 1.0}, "growth_rate = 1.0"),
        (Prodigy, {"lr": -1.0}, "lr = -1.0"),
        (ScheduleFreeAdamW, {"betas": (0.0, 0.9)}, "must|above 0"),
        (ScheduleFreeAdamW, {"weight_decay": -1.0}, "weight_decay = -1.0"),
    ],
)
def test_settings_out_of_range_are_refused(make, settings, message):
    with pytest.raises(OptimizerError, match=message):
        make([torch.nn.Parameter(torch.ones(2))], **settings)


QUIET = {"previews": {"every": 0}, "lora": {"rank": 2}}


RUNS = [("prodigy", "dora"), ("prodigy", "lora"), ("adamw_schedule_free", "lokr")]


@pytest.mark.parametrize(("name", "kind"), RUNS)
def test_a_stopped_run_goes_on_bit_for_bit(tiny_folder, photos, tmp_path, name, kind):
    settings = QUIET | {"steps": 4, "base": str(tiny_folder), "optim": {"name": name}}
    settings |= {"lora": {"kind": kind, "rank": 2}}
    train(photos, tmp_path / "whole", **settings)
    with pytest.raises(Stop):
        train(photos, tmp_path / "parts", on_step=crash_at(2), **settings)
    train(photos, tmp_path / "parts", **settings)
    same_run(tmp_path / "whole", tmp_path / "parts")


def test_the_file_of_a_schedule_free_run_holds_the_average(tiny_folder, photos, tmp_path):
    settings = QUIET | {"base": str(tiny_folder), "optim": {"name": "adamw_schedule_free"}}
    path = train(photos, tmp_path / "run", **settings)
    newest = sorted((tmp_path / "run/checkpoints").iterdir())[-1]
    state = load_file(newest / "training.safetensors")
    files = {pair.name: pair for pair in load_adapter(path).pairs}
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    key = f"unet.{name}.lora_B.concept.weight"
    y, z = state[f"weights/{key}"], state[f"optimizer/{key}/z"]
    found = files["lora_unet_" + name.replace(".", "_")].up
    torch.testing.assert_close(found, (y - 0.1 * z) / 0.9, rtol=1e-4, atol=1e-7)
    assert not torch.allclose(found, y, rtol=1e-3, atol=0)


def test_prodigy_leaves_embeddings_to_adamw_at_their_rate(tiny_folder, photos, tmp_path):
    def embedding(name, **optim):
        settings = QUIET | {"base": str(tiny_folder), "method": "pivotal", "steps": 2}
        settings |= {"tokens": {"first": 1}, "prior": {"weight": 0}}
        optim = {"name": name, "lr_tokens": 0.01, "weight_decay": 0, "warmup": 0} | optim
        path = train(photos, tmp_path / name, **settings, optim=optim)
        return load_adapter(path).tokens["<thing>"]

    torch.testing.assert_close(embedding("prodigy"), embedding("adamw"), rtol=1e-3, atol=1e-5)


ABOUT = {"photos": "a", "trigger": "<a>", "class_noun": "toy"}


def test_schedule_free_has_a_constant_rate_unless_another_is_asked_for():
    def optim(**settings):
        return configure(ABOUT | {"optim": {"name": "adamw_schedule_free"} | settings}).optim

    assert optim().schedule == "constant" and optim().lr == 2.5e-3
    assert configure(ABOUT).optim.schedule == "cosine"
    with pytest.raises(ConfigError, match=r"optim\.schedule = cosine: adamw_schedule_free av"):
        optim(schedule="cosine")
    with pytest.raises(ConfigError, match=r"ema = 0\.5: adamw_schedule_free has an average"):
        configure(ABOUT | {"ema": 0.5, "optim": {"name": "adamw_schedule_free"}})


def test_prodigys_rate_is_one():
    config = configure(ABOUT | {"optim": {"name": "prodigy"}, "lora": {"kind": "dora"}})
    assert (config.optim.lr_unet, config.optim.lr_text_encoder) == (1.0, 0.5)
