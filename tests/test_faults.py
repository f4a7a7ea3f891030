"""What goes wrong while a run is under way: nothing is lost, and a line says what to do."""

import itertools
import json
import os
import resource
import shutil
import signal
import sys

import pytest
import torch
from safetensors.torch import load_file

import killable
import rite_diffusion as rite
from forks import forked
from rite_diffusion.adapters import load_adapter
from rite_diffusion.errors import ConfigError, RunError
from rite_diffusion.training import previews
from rite_diffusion.training import trainer as loop
from rite_diffusion.training.run_folder import RunFolder
from runs import Stop, crash_at, same_run, train

OUT_OF_MEMORY = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")


def test_out_of_memory_says_what_saves_memory(photos, tmp_path, monkeypatch):
    steps = iter([None, OUT_OF_MEMORY])
    real = loop.step_loss

    def loss(*arguments):
        fault = next(steps)
        if fault:
            raise fault
        return real(*arguments)

    monkeypatch.setattr(loop, "step_loss", loss)
    with pytest.raises(RunError, match="batch = 1 with accumulate = 2, or precision = bf16"):
        train(photos, tmp_path / "run")
    monkeypatch.undo()
    os.environ["RITE_CACHE"] = str(tmp_path / "cache")
    train(photos, tmp_path / "run")  # goes on from step 1
    train(photos, tmp_path / "whole")
    same_run(tmp_path / "run", tmp_path / "whole")


def test_other_errors_are_not_reported_as_out_of_memory(photos, tmp_path, monkeypatch):
    def loss(*arguments):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(loop, "step_loss", loss)
    with pytest.raises(RuntimeError, match="shapes differ"):
        train(photos, tmp_path / "run")


def test_previews_without_memory_do_not_stop_the_run(photos, tmp_path, monkeypatch):
    def sample(*arguments, **settings):
        raise OUT_OF_MEMORY

    monkeypatch.setattr(previews, "sample_encoded", sample)
    assert train(photos, tmp_path / "run").exists()
    assert "out of memory for the previews of step 2" in (tmp_path / "run/log.txt").read_text()


def test_a_gradient_that_is_not_finite_is_skipped_and_logged(photos, tmp_path, monkeypatch):
    real = loop.Trainer._gradients

    def poison(trainer, batch):
        value = real(trainer, batch)
        if len(seen) == 1:
            trainer.parameters[0].grad.fill_(torch.inf)
        seen.append(trainer.parameters[0].detach().clone())
        return value

    seen = []
    monkeypatch.setattr(loop.Trainer, "_gradients", poison)
    train(photos, tmp_path / "run")
    assert torch.equal(seen[1], seen[2]) and not torch.equal(seen[0], seen[1])
    lines = list(map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines()))
    assert [bool(line.get("skipped")) for line in lines] == [False, True, False]
    assert "step 2 left out, no number came of" in (tmp_path / "run/log.txt").read_text()


def _train_with_little_room(photos, out, limit):
    """Train where no file may grow beyond `limit` bytes, as on a disk that is full."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        killable.run(photos, out, 10)
    except RunError as error:
        sys.exit(0 if "Make room" in str(error) else str(error))
    sys.exit("the run went through")


@pytest.mark.slow  # three trainings
def test_a_full_disk_leaves_the_checkpoint_before_it(photos, tmp_path):
    whole, full = tmp_path / "whole", tmp_path / "full"
    with pytest.raises(Stop):
        train(photos, full, **killable.SETTINGS | {"steps": 10}, on_step=crash_at(5))
    before = load_file(full / "checkpoints/step-000004/adapter.safetensors")
    process = forked(_train_with_little_room, photos, full, 100_000)
    process.join()
    assert process.exitcode == 0
    after = load_file(full / "checkpoints/step-000004/adapter.safetensors")
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert not list(full.rglob("*.tmp"))
    killable.run(photos, full, 10)
    killable.run(photos, whole, 10)
    same_run(whole, full)


@pytest.mark.parametrize("step", [1, 2], ids=["the same step again", "the next step"])
def test_a_kill_at_any_write_leaves_a_whole_checkpoint(tmp_path, step):
    killable.save_step(tmp_path / "first", 1)
    for point in itertools.count():
        folder = tmp_path / str(point)
        shutil.copytree(tmp_path / "first", folder)
        process = forked(killable.save_step_and_die, folder, step, point)
        process.join()
        with RunFolder(folder) as run:
            snapshot = run.newest_snapshot()
            assert snapshot.step in (1, step)
            assert (snapshot.tensors["weights/a"] == snapshot.step).all()
            [newest] = run.checkpoints()[-1:]
            saved = load_adapter(newest / "adapter.safetensors")
            assert saved.info.steps == str(snapshot.step) and (saved.pairs[0].up > 0).all()
            assert load_adapter(run.adapter_path).info.steps in ("1", str(snapshot.step))
            assert run.state() == "running"
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
    assert point > 8 and snapshot.step == step


def test_losses_that_stay_not_finite_keep_the_last_good_checkpoint(photos, tmp_path, monkeypatch):
    settings = {"steps": 9, "previews": {"every": 0}, "checkpoints": {"every": 1, "keep": 9}}
    real, calls = loop.step_loss, itertools.count()

    def loss(*arguments):
        return real(*arguments) * (torch.nan if next(calls) >= 2 else 1)

    monkeypatch.setattr(loop, "step_loss", loss)
    with pytest.raises(RunError, match=r"5 steps up to 7 .*\.png.*lower optim.lr"):
        train(photos, tmp_path / "run", **settings)
    folders = sorted((tmp_path / "run/checkpoints").iterdir())
    weights = [load_file(folder / "adapter.safetensors") for folder in folders]
    assert all(torch.isfinite(value).all() for each in weights for value in each.values())
    assert all(torch.equal(weights[-1][key], value) for key, value in weights[1].items())


def test_a_tracker_that_is_not_installed_is_named(photos, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"'wandb' is not installed .*rite-diffusion\[tracking\]"):
        train(photos, tmp_path / "run", trackers=["wandb"])


def test_milestones_stay_while_other_checkpoints_go(photos, tmp_path):
    settings = {"steps": 7, "checkpoints": {"every": 2, "keep": 1, "milestones": [3]}}
    train(photos, tmp_path / "run", **settings, previews={"every": 0})
    kept = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert kept == ["step-000003", "step-000007"]
    adapter = tmp_path / "run/checkpoints/step-000003/adapter.safetensors"
    assert rite.inspect(adapter).info.steps == "3"
