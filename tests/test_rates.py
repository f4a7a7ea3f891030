"""Learning rates: their course, what is told of them, and the probe that finds one."""

import re

import pytest

import rite_diffusion as rite
from rite_diffusion.cli.output import PlanPrinter
from rite_diffusion.config import OptimSection, from_toml
from rite_diffusion.methods import PlainLora
from rite_diffusion.photos.dataset import Encoding, encode_photos
from rite_diffusion.photos.folder import read_folder
from rite_diffusion.training import probe
from rite_diffusion.training.job import Job
from rite_diffusion.training.plan import plan_training
from rite_diffusion.training.rates import rate_factor
from rite_diffusion.training.trainer import train_steps
from rite_diffusion.types import Concept
from runs import Stop, config_of, crash_at, metrics, same_run, train


def test_each_component_has_its_own_learning_rate(photos, pocket):
    optim = {"lr": 1e-3, "lr_text_encoder": 1e-9, "warmup": 0, "weight_decay": 0.0}
    config = config_of(photos, steps=4, optim=optim)
    found = read_folder(photos, Concept("<thing>", "toy"), config.templates).photos
    data = encode_photos(pocket, found, Encoding(64))
    method = PlainLora(pocket, config)
    train_steps(Job(pocket, method, data, config), lambda report: None)
    largest = {"lora_te": 0.0, "lora_unet": 0.0}
    for pair in method.pairs():
        kind = "lora_te" if pair.name.startswith("lora_te") else "lora_unet"
        largest[kind] = max(largest[kind], pair.up.abs().max().item())
    assert largest["lora_unet"] > 1e-4
    assert 0 < largest["lora_te"] < 1e-7


@pytest.mark.parametrize(
    ("warmup", "schedule", "steps", "factors"),
    [
        (1, "linear", 5, [1 / 2, 1, 3 / 4, 2 / 4, 1 / 4]),
        (10, "linear", 5, [1 / 2, 1, 3 / 4, 2 / 4, 1 / 4]),  # a fifth of 5 steps
        (4, "constant", 20, [1 / 5, 2 / 5, 3 / 5, 4 / 5, *[1] * 16]),
        (0, "cosine", 4, [1, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5]),
        (10, "cosine", 1, [1]),
        (1000, "constant", 4, [1, 1, 1, 1]),
    ],
)
def test_rates_warm_up_for_a_fifth_at_most_and_then_decay(warmup, schedule, steps, factors):
    factor = rate_factor(OptimSection(warmup=warmup, schedule=schedule), steps)
    assert [factor(step) for step in range(steps)] == pytest.approx(factors)
    if schedule != "constant":
        assert factor(steps) == pytest.approx(0)


def test_the_report_shows_the_learning_rate_schedule(photos, capsys):
    told = {
        "warm-up 10 steps, then cosine to 0": {"steps": 50},
        "warm-up 1 (10 asked: at most a fifth of 5) steps, then cosine to 0": {"steps": 5},
        "warm-up 0 steps, then constant": {"optim": {"warmup": 0, "schedule": "constant"}},
    }
    for text, settings in told.items():
        plan_training(config_of(photos, **settings), PlanPrinter())
        assert text in capsys.readouterr().out


def test_a_short_run_reaches_the_rate_that_the_report_states(photos, tmp_path):
    train(photos, tmp_path / "run", steps=5, previews={"every": 0}, optim={"lr": 1e-3})
    rates = [rate for _, _, rate in metrics(tmp_path / "run")]
    assert max(rates) == pytest.approx(1e-3) and rates[0] == pytest.approx(5e-4)


def test_a_rate_without_effect_on_the_text_encoder_is_reported(photos):
    given = {"lora": {"text_encoder": False}, "optim": {"lr_text_encoder": 1e-4}}
    [line] = plan_training(config_of(photos, **given)).fallbacks
    assert line.startswith("optim.lr_text_encoder = 0.0001 has no effect")
    assert plan_training(config_of(photos, lora={"text_encoder": False})).fallbacks == []
    own = config_of(photos, lora={"text_encoder": False})
    assert own.optim.lr_text_encoder is None
    assert config_of(photos).optim.lr_text_encoder == config_of(photos).optim.lr_unet / 2


def test_a_probe_finds_the_rate_and_a_resumed_run_keeps_it(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(probe, "STEPS", 2)
    settings = {"optim": {"lr": "auto"}, "steps": 4, "previews": {"every": 0}}
    whole = train(photos, tmp_path / "whole", **settings)
    [line] = [x for x in (tmp_path / "whole/log.txt").read_text().splitlines() if "probe:" in x]
    tried = re.findall(r"rate (\S+): loss (\S+?)(?:,|$)", line)
    best = min(tried, key=lambda rate_and_loss: float(rate_and_loss[1]))
    chosen = from_toml((tmp_path / "whole/config.toml").read_text()).optim
    assert len(tried) == 5 and chosen.lr == "auto"
    assert chosen.lr_unet == pytest.approx(float(best[0]), rel=1e-4)
    assert chosen.lr_text_encoder == chosen.lr_unet / 2
    with pytest.raises(Stop):
        train(photos, tmp_path / "parts", on_step=crash_at(2), **settings)
    train(photos, tmp_path / "parts", **settings)
    assert (tmp_path / "parts/log.txt").read_text().count("probe:") == 1
    same_run(tmp_path / "whole", tmp_path / "parts")
    assert rite.inspect(whole).info.steps == "4"
