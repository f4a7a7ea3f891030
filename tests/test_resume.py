import contextlib
import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import killable
import rite_diffusion as rite
from forks import forked, forked_command
from rite_diffusion.errors import RunError
from rite_diffusion.methods import PlainLora
from rite_diffusion.optim import OPTIMIZERS
from rite_diffusion.photos.dataset import Encoding, encode_photos
from rite_diffusion.photos.folder import read_folder
from rite_diffusion.training import lock, resume
from rite_diffusion.training.interrupt import stop_on_signal
from rite_diffusion.training.job import Job
from rite_diffusion.training.lock import is_in_use
from rite_diffusion.training.run_folder import RunFolder
from rite_diffusion.training.trainer import train_steps
from rite_diffusion.types import Concept
from runs import Stop, config_of, crash_at, same_run, train


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_interrupted_run_equals_the_uninterrupted_one(photos, tmp_path, name):
    settings = {
        "steps": 4, "checkpoints": {"every": 2}, "previews": {"every": 0},
        "optim": {"name": name, "warmup": 3},
    }  # fmt: skip
    train(photos, tmp_path / "whole", **settings)
    with pytest.raises(Stop):
        train(photos, tmp_path / "parts", on_step=crash_at(3), **settings)
    train(photos, tmp_path / "parts", **settings)
    same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_run_that_crashes_three_times_equals_the_uninterrupted_one(photos, tmp_path):
    settings = {
        "steps": 7, "checkpoints": {"every": 2}, "previews": {"every": 0},
        "lora": {"layers": "blocks"}, "optim": {"name": "rite", "warmup": 3},
    }  # fmt: skip
    train(photos, tmp_path / "whole", **settings)
    for crash in (1, 3, 6):  # before any checkpoint, just after one, and before the last step
        with pytest.raises(Stop):
            train(photos, tmp_path / "parts", on_step=crash_at(crash), **settings)
    train(photos, tmp_path / "parts", **settings)
    same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_crash_before_the_last_write_loses_no_step(photos, tmp_path):
    path = train(photos, tmp_path / "run")
    before = load_file(path)
    path.unlink()
    status = json.loads((tmp_path / "run/status.json").read_text()) | {"state": "running"}
    (tmp_path / "run/status.json").write_text(json.dumps(status))
    again = load_file(train(photos, tmp_path / "run", on_step=crash_at(1)))
    assert all(torch.equal(again[key], value) for key, value in before.items())


def test_averaged_weights_are_saved_and_resumed_exactly(photos, tmp_path, own_pocket):
    settings = {"steps": 5, "checkpoints": {"every": 2}, "previews": {"every": 0}, "ema": 0.8}
    train(photos, tmp_path / "whole", **settings)
    with pytest.raises(Stop):
        train(photos, tmp_path / "parts", on_step=crash_at(3), **settings)
    train(photos, tmp_path / "parts", **settings)
    same_run(tmp_path / "whole", tmp_path / "parts")
    config = config_of(photos, **settings)
    found = read_folder(photos, Concept("<thing>", "toy"), config.templates).photos
    method = PlainLora(own_pocket, config)
    live = []
    data = encode_photos(own_pocket, found, Encoding(64))
    job = Job(own_pocket, method, data, config.model_copy(update={"ema": 0.0}))
    train_steps(job, lambda _: live.append({pair.name: pair.up.clone() for pair in method.pairs()}))
    expected = {name: torch.zeros_like(up) for name, up in live[0].items()}
    for step, ups in enumerate(live):
        decay = min(0.8, (1 + step) / (10 + step))
        expected = {n: decay * value + (1 - decay) * ups[n] for n, value in expected.items()}
    for pair in rite.inspect(tmp_path / "whole/adapter.safetensors").pairs:
        torch.testing.assert_close(pair.up, expected[pair.name])


@pytest.mark.slow  # twenty processes
def test_a_process_that_is_killed_twenty_times_loses_nothing(photos, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    killable.run(photos, whole)
    draws = random.Random(0)
    for kill in range(20):
        process = forked(killable.run, photos, parts)
        if kill % 2:  # while it trains, else at any moment from the start on
            _wait_for_a_step(parts / "metrics.jsonl")
        time.sleep(draws.uniform(0, 0.2 if kill % 2 else 0.5))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    killable.run(photos, parts)
    same_run(whole, parts)


def test_runs_with_two_threads_are_identical_killed_or_not(photos, tmp_path, monkeypatch):
    for caption in photos.glob("*.txt"):
        caption.unlink()
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["killable"])
    whole, killed = (
        context.Process(target=killable.run_threaded, args=(photos, tmp_path / name))
        for name in ("whole", "killed")
    )
    for process in (whole, killed):  # each is the other's load
        process.start()
    while _size(tmp_path / "killed/metrics.jsonl") == 0:
        assert killed.is_alive()
        time.sleep(0.02)
    killed.kill()
    killed.join()
    again = context.Process(target=killable.run_threaded, args=(photos, tmp_path / "killed"))
    again.start()
    for process in (whole, again):
        process.join()
        assert process.exitcode == 0
    same_run(tmp_path / "whole", tmp_path / "killed")


def _wait_for_a_step(metrics: Path, seconds: float = 120) -> None:
    """Until a line more is there than now."""
    before, end = _size(metrics), time.monotonic() + seconds
    while _size(metrics) <= before:
        assert time.monotonic() < end, f"{metrics} does not grow"
        time.sleep(0.02)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def test_a_damaged_checkpoint_falls_back_to_the_one_before(photos, tmp_path):
    settings = {"steps": 6, "checkpoints": {"every": 2}, "previews": {"every": 0}}
    train(photos, tmp_path / "whole", **settings)
    with pytest.raises(Stop):
        train(photos, tmp_path / "run", on_step=crash_at(5), **settings)
    damaged = tmp_path / "run/checkpoints/step-000004/training.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:1000])
    (tmp_path / "run/checkpoints/step-000006.partial").mkdir()
    train(photos, tmp_path / "run", **settings)
    assert "step-000004 cannot be read" in (tmp_path / "run/log.txt").read_text()
    same_run(tmp_path / "whole", tmp_path / "run")


def test_resuming_with_changed_settings_or_photos_needs_override(photos, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(Stop):
        train(photos, run, on_step=crash_at(2))
    with pytest.raises(RunError, match="optim.lr: 0.002 -> 0.003") as fault:
        train(photos, run, optim={"lr": 3e-3})
    assert "--override" in str(fault.value)
    (photos / "0.txt").write_text("a <thing> on a purple background")
    with pytest.raises(RunError, match=r"photo photos/0.png: \w+ -> \w+"):
        train(photos, run)
    train(photos, run, override=True)
    assert "overridden: photo photos/0.png" in (run / "log.txt").read_text()


def test_the_same_command_resumes_and_another_uses_a_new_folder(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Stop):
        train(photos, None, on_step=crash_at(2))
    assert train(photos, None, seed=5) == Path("runs/photos-2/adapter.safetensors")
    assert train(photos, None) == Path("runs/photos/adapter.safetensors")
    assert train(photos, None) == Path("runs/photos-3/adapter.safetensors")


def test_resuming_with_another_version_or_base_is_refused(
    photos, tmp_path, monkeypatch, tiny_folder, tiny_folder_2
):
    base, run = tmp_path / "base", tmp_path / "run"
    base.symlink_to(tiny_folder)
    settings = {"base": str(base), "resolution": 64, "precision": "fp32", "previews": {"every": 0}}
    with pytest.raises(Stop):
        train(photos, run, on_step=crash_at(2), **settings)
    adapter = run / "checkpoints/step-000001/adapter.safetensors"
    before = adapter.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(resume, "__version__", "99.0")
        with pytest.raises(RunError, match=r"version: \S+ -> 99.0.*--override"):
            train(photos, run, **settings)
    base.unlink()
    base.symlink_to(tiny_folder_2)
    with pytest.raises(RunError, match=r"base: \w{16} -> \w{16}.*--override"):
        train(photos, run, **settings)
    assert adapter.read_bytes() == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_the_run_within_the_step(photos, tmp_path, number):
    written = tmp_path / "stderr"
    # A long step of short parts: Python hears of a signal between two calls of torch.
    process = _rite_train(photos, tmp_path / "run", written, "batch=1", "accumulate=1024")
    _wait_for(process, tmp_path / "run/status.json", '"running"')
    time.sleep(1)  # well into the step
    os.kill(process.pid, number)
    _wait_for(process, written, "once more stops at once")
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode in (128 + number, -number)  # a shell tells 143 of the second too
    assert "stopped at step" not in written.read_text() and "Traceback" not in written.read_text()
    assert not (tmp_path / "run/adapter.safetensors").exists()
    with RunFolder(tmp_path / "run") as run:  # the lock is free, or a dead process's
        assert run.state() != "finished"


def test_a_second_signal_ends_the_step_even_if_its_exception_is_caught():
    before = signal.getsignal(signal.SIGINT)
    with stop_on_signal() as request:
        assert not request.is_set()
        signal.raise_signal(signal.SIGINT)
        assert request.is_set()
        with contextlib.suppress(KeyboardInterrupt):  # as some library's code might
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            request.is_set()
    assert signal.getsignal(signal.SIGINT) is before


def test_a_step_can_end_between_its_parts(pocket, photos):
    config = config_of(photos, steps=2, batch=1, accumulate=5)
    found = read_folder(photos, Concept("<thing>", "toy"), config.templates).photos
    data = encode_photos(pocket, found, Encoding(64))
    calls = []

    def stop() -> bool:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return False

    job = Job(pocket, PlainLora(pocket, config), data, config)
    with pytest.raises(KeyboardInterrupt):
        train_steps(job, lambda report: None, stop=stop)
    assert len(calls) == 3


def _rite_train(photos, run, written, *assignments):
    """`rite train` in a process of its own, for many steps; what it prints goes to a file."""
    line = ["train", str(photos), "--trigger", "<t>", "--class", "toy", "--steps", "5000"]
    for assignment in ("prior.weight=0", "previews.every=0", *assignments):
        line += ["--set", assignment]
    return forked_command([*line, "--out", str(run)], written)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_run_with_a_valid_adapter(photos, tmp_path, number):
    run, written = tmp_path / "run", tmp_path / "written"
    process = _rite_train(photos, run, written)
    _wait_for(process, run / "metrics.jsonl")
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == 128 + number
    told = written.read_text()
    assert "stopped at step" in told and "Traceback" not in told
    assert len(rite.inspect(run / "adapter.safetensors").pairs) == 137
    assert json.loads((run / "status.json").read_text())["state"] == "stopped"


def _wait_for(process, path: Path, words: str = "", seconds: float = 300) -> None:
    """Until a file has these words, while a process is at work."""
    end = time.monotonic() + seconds
    while not (path.exists() and words in path.read_text()):
        assert process.is_alive() and time.monotonic() < end, (
            f"no {path}, or nothing of {words!r} in it"
        )
        time.sleep(0.1)


def test_a_finished_or_busy_run_folder_is_refused(photos, tmp_path):
    train(photos, tmp_path / "run", steps=1)
    with pytest.raises(RunError, match="already holds an adapter"):
        train(photos, tmp_path / "run", steps=1)
    with RunFolder(tmp_path / "busy"), pytest.raises(RunError, match="in use by process"):
        RunFolder(tmp_path / "busy").__enter__()


@pytest.mark.parametrize("owner", ["this process", "another process", "", "no number"])
def test_a_lock_file_without_a_process_does_not_lock(tmp_path, owner):
    run = tmp_path / "run"
    run.mkdir()
    numbers = {"this process": str(os.getpid()), "another process": str(os.getppid())}
    (run / "lock").write_text(numbers.get(owner, owner))
    assert not is_in_use(run)
    with RunFolder(run):
        assert is_in_use(run) and (run / "lock").read_text() == str(os.getpid())
    assert not is_in_use(run) and not (run / "lock").exists()


def test_a_killed_process_releases_its_lock_and_a_copied_lock_is_free(tmp_path):
    run, copy = tmp_path / "run", tmp_path / "copy"
    code = "import sys, time, pathlib; from rite_diffusion.training.lock import Lock; "
    code += "lock = Lock(pathlib.Path(sys.argv[1])); print(lock.acquire(), flush=True); "
    code += "time.sleep(600)"
    run.mkdir()
    command = [sys.executable, "-c", code, str(run / "lock")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "True\n"
    shutil.copytree(run, copy)
    assert is_in_use(run) and not is_in_use(copy)
    with pytest.raises(RunError, match=f"in use by process {process.pid}"):
        RunFolder(run).__enter__()
    process.kill()
    process.wait()
    process.stdout.close()
    assert (run / "lock").exists() and not is_in_use(run)
    for folder in (run, copy):
        with RunFolder(folder):
            assert is_in_use(folder)


def test_a_file_system_without_locks_is_used_and_logged(tmp_path, monkeypatch):
    def refuse(descriptor, shared):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock, "_try_lock", refuse)
    with RunFolder(tmp_path / "run"):
        assert not is_in_use(tmp_path / "run")
    assert "no locks" in (tmp_path / "run/log.txt").read_text()


def test_a_finished_run_resumes_for_more_steps(photos, tmp_path):
    settings = {"previews": {"every": 0}, "optim": {"schedule": "constant", "warmup": 0}}
    train(photos, tmp_path / "whole", steps=5, **settings)
    run = tmp_path / "run"
    train(photos, run, steps=3, **settings)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for wanted, words in ((3, "more than its 3 steps"), (2, "already holds an adapter")):
        with pytest.raises(RunError, match=words):
            train(photos, run, steps=wanted, override=True, **settings)
    with pytest.raises(RunError, match="seed: 0 -> 1"):
        train(photos, run, steps=5, seed=1, **settings)
    assert {path: path.read_bytes() for path in before} == before
    with pytest.raises(Stop):
        train(photos, run, steps=5, on_step=crash_at(4), **settings)
    adapter = train(photos, run, steps=5, **settings)
    assert rite.inspect(adapter).info.steps == "5"
    same_run(tmp_path / "whole", run)
    assert "goes on after step 3 to 5" in (run / "log.txt").read_text()


def test_resuming_with_fewer_steps_than_done_is_refused(photos, tmp_path):
    with pytest.raises(Stop):
        train(photos, tmp_path / "run", steps=6, on_step=crash_at(5))
    with pytest.raises(RunError, match="has done 4 steps, 2 are wanted"):
        train(photos, tmp_path / "run", steps=2, override=True)
