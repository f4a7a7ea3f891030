import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import rite_diffusion as rite
from rite_diffusion.concepts import PlainLora
from rite_diffusion.config import OptimSection, from_toml
from rite_diffusion.optim import OPTIMIZERS
from rite_diffusion.photos.dataset import encode_photos
from rite_diffusion.photos.folder import read_folder
from rite_diffusion.recipes import configure, plan_training
from rite_diffusion.training import loop
from rite_diffusion.training.loop import (
    batch_loss,
    build_optimizer,
    draw_batch,
    rate_factor,
    train_steps,
)
from rite_diffusion.training.run_folder import RunFolder
from rite_diffusion.types import Concept, ConfigError, RunError

QUICK = {"steps": 3, "batch": 2, "previews": {"every": 2, "steps": 2}, "checkpoints": {"every": 1}}


def _train(photos, out, **settings):
    return rite.train(
        photos, trigger="<thing>", class_noun="toy", preset="pocket", out=out, **QUICK | settings
    )


def _config(photos, **settings):
    wanted = {"photos": str(photos), "trigger": "<thing>", "class_noun": "toy"}
    return configure(wanted | QUICK | settings, "pocket")


def test_a_run_leaves_the_folder_that_the_design_names(photos, tmp_path):
    adapter = _train(photos, tmp_path / "run")
    run = tmp_path / "run"
    assert adapter == run / "adapter.safetensors"
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-000002", "step-000003"]
    assert sorted(p.name for p in (run / "previews").iterdir()) == [
        "step-000002-0.png",
        "step-000002-1.png",
    ]
    assert not (run / "lock").exists()
    config = from_toml((run / "config.toml").read_text())
    assert (config.steps, config.resolution, config.optim.lr) == (3, 64, 2e-3)
    info = rite.inspect(adapter).info
    assert (info.trigger, info.class_noun, info.base, info.steps) == (
        "<thing>",
        "toy",
        "pocket",
        "3",
    )
    assert str(tmp_path) not in adapter.read_bytes().decode("latin-1")


def test_the_same_seed_gives_the_same_adapter_and_another_does_not(photos, tmp_path):
    first, again, other = (
        rite.inspect(_train(photos, tmp_path / name, seed=seed))
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    for one, two, three in zip(first.pairs, again.pairs, other.pairs, strict=True):
        assert torch.equal(one.down, two.down) and torch.equal(one.up, two.up)
        assert not torch.equal(one.down, three.down)


def step_loss(backbone, method, data, config, step):
    return batch_loss(backbone, method, draw_batch(backbone, data, config, step), config)


@torch.no_grad()
def _mean_loss(backbone, method, data, config) -> float:
    """The loss at fixed noise and timesteps that training never uses."""
    return sum(step_loss(backbone, method, data, config, 10_000 + i).item() for i in range(8)) / 8


def test_training_lowers_the_loss_and_leaves_the_base_alone(photos, pocket):
    config = _config(photos, steps=60, batch=4)
    found = read_folder(photos, Concept("<thing>", "toy"), config.templates).photos
    data = encode_photos(pocket, found, 64, flip=False)
    before = {name: part.state_dict() for name, part in pocket.components.items()}
    method = PlainLora(pocket, config)
    before_training = _mean_loss(pocket, method, data, config)
    train_steps(pocket, method, data, config, lambda report: None)
    assert _mean_loss(pocket, method, data, config) < 0.9 * before_training
    method.remove()
    for name, part in pocket.components.items():
        assert all(torch.equal(v, before[name][k]) for k, v in part.state_dict().items())


def test_each_component_moves_by_its_own_rate(photos, pocket):
    optim = {"lr": 1e-3, "lr_text_encoder": 1e-9, "warmup": 0, "weight_decay": 0.0}
    config = _config(photos, steps=4, optim=optim)
    found = read_folder(photos, Concept("<thing>", "toy"), config.templates).photos
    data = encode_photos(pocket, found, 64, flip=False)
    method = PlainLora(pocket, config)
    train_steps(pocket, method, data, config, lambda report: None)
    largest = {"lora_te": 0.0, "lora_unet": 0.0}
    for pair in method.pairs():
        kind = "lora_te" if pair.name.startswith("lora_te") else "lora_unet"
        largest[kind] = max(largest[kind], pair.up.abs().max().item())
    assert largest["lora_unet"] > 1e-4
    assert 0 < largest["lora_te"] < 1e-7


def test_a_step_is_a_function_of_seed_and_step(photos, pocket):
    config = _config(photos)
    found = read_folder(photos, Concept("<thing>", "toy"), config.templates).photos
    data = encode_photos(pocket, found, 64, flip=False)
    method = PlainLora(pocket, config)
    losses = [step_loss(pocket, method, data, config, step).item() for step in (5, 6, 5)]
    assert losses[0] == losses[2] != losses[1]


def test_rates_warm_up_and_decay():
    factor = rate_factor(OptimSection(warmup=4, schedule="linear"), 100)
    assert factor(0) == pytest.approx(0.2)
    assert factor(50) == pytest.approx(0.5)
    assert rate_factor(OptimSection(warmup=0, schedule="cosine"), 10)(10) == pytest.approx(
        0, abs=1e-6
    )
    assert rate_factor(OptimSection(warmup=0, schedule="constant"), 10)(9) == 1


def test_half_precision_trains_pairs_in_single_precision(photos, tmp_path):
    adapter = rite.inspect(_train(photos, tmp_path / "half", steps=3, precision="bf16"))
    reference = rite.inspect(_train(photos, tmp_path / "single", steps=3))
    for pair, exact in zip(adapter.pairs, reference.pairs, strict=True):
        assert torch.isfinite(pair.up).all() and pair.up.dtype == torch.float32
        torch.testing.assert_close(pair.down, exact.down, rtol=0.1, atol=0.02)


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "adamw_plus"])
def test_every_optimizer_trains(photos, pocket, name):
    config = _config(photos, optim={"name": name})
    method = PlainLora(pocket, config)
    rates = [group["lr"] for group in build_optimizer(method, config).param_groups]
    assert rates == [config.optim.lr, config.optim.lr / 2]
    method.remove()


def test_a_loss_that_is_no_number_stops_the_run(photos, tmp_path, monkeypatch):
    broken = lambda prediction, _: prediction * float("nan")  # noqa: E731
    monkeypatch.setattr(loop, "squared_error", broken)
    with pytest.raises(RunError, match=r"with .*\.png: lower optim.lr"):
        _train(photos, tmp_path / "run", steps=20)
    assert json.loads((tmp_path / "run/status.json").read_text())["state"] == "failed"
    assert not (tmp_path / "run/adapter.safetensors").exists()


@pytest.mark.parametrize(
    "setting",
    [
        {"loss": "huber"},
        {"weighting": "min_snr"},
        {"weighting": "debiased"},
        {"timesteps": "logit_normal"},
        {"noise_offset": 0.3},
        {"input_perturbation": 0.3},
        {"caption_dropout": 0.9},
    ],
    ids=str,
)
def test_every_objective_setting_acts(photos, pocket, setting):
    found = read_folder(photos, Concept("<thing>", "toy"), ["a {trigger}"]).photos
    data = encode_photos(pocket, found, 64, flip=False)
    plain, changed = _config(photos), _config(photos, objective=setting)
    method = PlainLora(pocket, plain)
    losses = [step_loss(pocket, method, data, each, 3).item() for each in (plain, changed)]
    assert losses[0] != losses[1] and all(map(math.isfinite, losses))


@pytest.mark.parametrize(
    "setting",
    [{"batch": 2, "accumulate": 2}, {"batch": 4, "gradient_checkpointing": True}],
    ids=str,
)
def test_less_memory_gives_the_same_weights(photos, tmp_path, setting):
    settings = {"precision": "fp32", "previews": {"every": 0}, "optim": {"name": "sgd"}}
    whole = rite.inspect(_train(photos, tmp_path / "whole", batch=4, **settings))
    parts = rite.inspect(_train(photos, tmp_path / "parts", **setting, **settings))
    assert any(pair.up.abs().max() > 0 for pair in whole.pairs)
    for one, two in zip(whole.pairs, parts.pairs, strict=True):
        torch.testing.assert_close(one.up, two.up, rtol=1e-3, atol=1e-6)


def test_a_single_bad_step_changes_nothing(photos, pocket, monkeypatch):
    config = _config(photos, steps=1)
    found = read_folder(photos, Concept("<thing>", "toy"), config.templates).photos
    data = encode_photos(pocket, found, 64, flip=False)
    method = PlainLora(pocket, config)
    before = [pair.down.clone() for pair in method.pairs()]
    broken = lambda prediction, _: prediction * float("nan")  # noqa: E731
    monkeypatch.setattr(loop, "squared_error", broken)
    train_steps(pocket, method, data, config, lambda report: None)
    for pair, value in zip(method.pairs(), before, strict=True):
        assert torch.equal(pair.down, value) and pair.up.abs().max() == 0


def test_a_finished_or_busy_run_folder_is_refused(photos, tmp_path):
    _train(photos, tmp_path / "run", steps=1)
    with pytest.raises(RunError, match="already holds an adapter"):
        _train(photos, tmp_path / "run", steps=1)
    with RunFolder(tmp_path / "busy"), pytest.raises(RunError, match="in use by process"):
        RunFolder(tmp_path / "busy").__enter__()


def test_a_lock_of_a_dead_process_is_taken_over(tmp_path):
    (tmp_path / "run").mkdir()
    child = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True
    )
    (tmp_path / "run/lock").write_bytes(child.stdout)
    with RunFolder(tmp_path / "run") as run:
        assert (run.path / "lock").exists()


@pytest.mark.parametrize("trigger", ["robot", "Dog"])
def test_a_trigger_that_the_base_knows_is_refused(photos, trigger):
    with pytest.raises(ConfigError, match=f"use a new word such as '<{trigger}>'"):
        plan_training(_config(photos, trigger=trigger))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_valid_adapter_and_says_so(photos, tmp_path, number):
    run = tmp_path / "run"
    line = ["train", str(photos), "--trigger", "<t>", "--class", "toy", "--steps", "5000"]
    code = "from rite_diffusion.cli import main; main()"
    command = [sys.executable, "-c", code, *line, "--out", str(run)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    _wait_for(run / "metrics.jsonl")
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "stopped at step" in errors and "Traceback" not in errors
    assert len(rite.inspect(run / "adapter.safetensors").pairs) == 64
    assert json.loads((run / "status.json").read_text())["state"] == "stopped"


def _wait_for(path: Path, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"no {path}"
        time.sleep(0.1)


def _metrics(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["rate"]) for line in lines]


def _same_run(one, other):
    """Whether two run folders hold the same training, bit for bit."""
    assert _metrics(one) == _metrics(other)
    for name in ("adapter", "training"):
        newest = [sorted((run / "checkpoints").iterdir())[-1] for run in (one, other)]
        first, second = (load_file(folder / f"{name}.safetensors") for folder in newest)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)


class _Stop(Exception):
    """Stands in for a crash."""


def _crash_at(step):
    def listen(report):
        if report.step == step:
            raise _Stop

    return listen


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_interrupted_run_is_the_uninterrupted_one(photos, tmp_path, name):
    settings = {
        "steps": 7, "checkpoints": {"every": 2}, "previews": {"every": 0},
        "optim": {"name": name, "warmup": 3},
    }  # fmt: skip
    _train(photos, tmp_path / "whole", **settings)
    for crash in (1, 3, 6):  # before any checkpoint, just after one, and before the last step
        with pytest.raises(_Stop):
            _train(photos, tmp_path / "parts", listen=_crash_at(crash), **settings)
    _train(photos, tmp_path / "parts", **settings)
    _same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_crash_before_the_last_write_costs_no_step(photos, tmp_path):
    path = _train(photos, tmp_path / "run")
    before = load_file(path)
    path.unlink()
    status = json.loads((tmp_path / "run/status.json").read_text()) | {"state": "running"}
    (tmp_path / "run/status.json").write_text(json.dumps(status))
    again = load_file(_train(photos, tmp_path / "run", listen=_crash_at(1)))
    assert all(torch.equal(again[key], value) for key, value in before.items())


def test_averaged_weights_are_saved_and_go_on_exactly(photos, tmp_path, pocket):
    settings = {"steps": 5, "checkpoints": {"every": 2}, "previews": {"every": 0}, "ema": 0.8}
    _train(photos, tmp_path / "whole", **settings)
    with pytest.raises(_Stop):
        _train(photos, tmp_path / "parts", listen=_crash_at(3), **settings)
    _train(photos, tmp_path / "parts", **settings)
    _same_run(tmp_path / "whole", tmp_path / "parts")
    config = _config(photos, **settings)
    found = read_folder(photos, Concept("<thing>", "toy"), config.templates).photos
    method = PlainLora(pocket, config)
    live = []
    train_steps(
        pocket, method, encode_photos(pocket, found, 64, flip=False),
        config.model_copy(update={"ema": 0.0}),
        lambda report: live.append({pair.name: pair.up.clone() for pair in method.pairs()}),
    )  # fmt: skip
    expected = {name: torch.zeros_like(up) for name, up in live[0].items()}
    for step, ups in enumerate(live):
        decay = min(0.8, (1 + step) / (10 + step))
        expected = {n: decay * value + (1 - decay) * ups[n] for n, value in expected.items()}
    for pair in rite.inspect(tmp_path / "whole/adapter.safetensors").pairs:
        torch.testing.assert_close(pair.up, expected[pair.name])


def test_a_killed_process_loses_nothing(photos, tmp_path):
    settings = ["--set", "checkpoints.every=3", "--set", "previews.every=0", "--steps", "40"]
    line = ["train", str(photos), "--trigger", "<t>", "--class", "toy", *settings]
    command = [sys.executable, "-c", "from rite_diffusion.cli import main; main()", *line]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    subprocess.run([*command, "--out", str(whole)], check=True, capture_output=True)
    for wait in (0.0, 0.4):
        process = subprocess.Popen([*command, "--out", str(parts)], stdout=subprocess.DEVNULL)
        _wait_for(parts / "checkpoints/step-000003")
        time.sleep(wait)
        process.kill()
        process.wait()
    subprocess.run([*command, "--out", str(parts)], check=True, capture_output=True)
    _same_run(whole, parts)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(photos, tmp_path):
    settings = {"steps": 6, "checkpoints": {"every": 2}, "previews": {"every": 0}}
    _train(photos, tmp_path / "whole", **settings)
    with pytest.raises(_Stop):
        _train(photos, tmp_path / "run", listen=_crash_at(5), **settings)
    damaged = tmp_path / "run/checkpoints/step-000004/training.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:1000])
    (tmp_path / "run/checkpoints/step-000006.partial").mkdir()
    _train(photos, tmp_path / "run", **settings)
    assert "step-000004 cannot be read" in (tmp_path / "run/log.txt").read_text()
    _same_run(tmp_path / "whole", tmp_path / "run")


def test_changed_settings_or_photos_are_shown_and_need_an_override(photos, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(_Stop):
        _train(photos, run, listen=_crash_at(2))
    with pytest.raises(RunError, match="optim.lr: 0.002 -> 0.001") as fault:
        _train(photos, run, optim={"lr": 1e-3})
    assert "--override" in str(fault.value)
    (photos / "0.txt").write_text("a <thing> on a purple background")
    with pytest.raises(RunError, match=r"photo 0.png: \w+ -> \w+"):
        _train(photos, run)
    _train(photos, run, override=True)
    assert "overridden: photo 0.png" in (run / "log.txt").read_text()


def test_the_same_command_goes_on_and_a_new_one_takes_a_new_folder(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(_Stop):
        _train(photos, None, listen=_crash_at(2))
    assert _train(photos, None, seed=5) == Path("runs/photos-2/adapter.safetensors")
    assert _train(photos, None) == Path("runs/photos/adapter.safetensors")
    assert _train(photos, None) == Path("runs/photos-3/adapter.safetensors")


def test_two_processes_equal_one_with_twice_the_batch(photos, tmp_path, unused_port):
    script = Path(__file__).parents[1] / "train/concept.py"
    line = [str(photos), "--trigger", "<t>", "--class", "toy", "--steps", "3"]
    line += ["--set", "previews.every=0", "--set", "optim.name=sgd"]
    launch = ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={unused_port}"]
    for name, start, batch in (("two", launch, 2), ("one", [], 4)):
        command = [sys.executable, *start, str(script), *line, "--set", f"batch={batch}"]
        command += ["--out", str(tmp_path / name)]
        done = subprocess.run(command, capture_output=True, text=True, env=_one_thread())
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("adapter.safetensors") >= 1
    one, two = (rite.inspect(tmp_path / name / "adapter.safetensors") for name in ("one", "two"))
    assert any(pair.up.abs().max() > 0 for pair in one.pairs)
    for first, second in zip(one.pairs, two.pairs, strict=True):
        torch.testing.assert_close(first.up, second.up, rtol=1e-3, atol=1e-6)
    losses = [[loss for _, loss, _ in _metrics(tmp_path / name)] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def _one_thread():
    return os.environ | {"OMP_NUM_THREADS": "1"}
