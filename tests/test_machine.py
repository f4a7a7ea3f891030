"""What the machine lacks: a network, a GPU, a precision, xformers, another process."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from accelerate import PartialState

import rite_diffusion as rite
from rite_diffusion.backbones.source import choose_attention, usable_precision
from rite_diffusion.cli.app import main
from rite_diffusion.errors import BackboneError, RunError
from rite_diffusion.training.plan import plan_training
from rite_diffusion.training.processes import ProcessRank, ignored_variables_note, read_rank
from rite_diffusion.training.run import run_training
from rite_diffusion.training.run_folder import RunFolder
from runs import config_of, train


@pytest.fixture
def hub_cache(tmp_path, monkeypatch, tiny_folder):
    """A hub cache that holds `someone/model`, and no way out to a network."""
    commit, cache = "0" * 40, tmp_path / "hub" / "models--someone--model"
    shutil.copytree(tiny_folder, cache / "snapshots" / commit)
    (cache / "refs").mkdir()
    (cache / "refs/main").write_text(commit)
    for module in ("huggingface_hub.constants", "huggingface_hub.file_download.constants"):
        monkeypatch.setattr(f"{module}.HF_HUB_CACHE", str(cache.parent))
    monkeypatch.setattr("diffusers.utils.constants.HF_MODULES_CACHE", str(tmp_path / "modules"))
    tried = []

    def refuse(*arguments, **options):
        tried.append(arguments)
        raise OSError("the network is blocked")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return tried


def test_a_cached_hub_model_trains_and_draws_without_a_network(hub_cache, photos, tmp_path):
    settings = {"base": "someone/model", "resolution": 64, "precision": "fp32"}
    adapter = train(photos, tmp_path / "run", previews={"every": 0}, **settings)
    [image] = rite.generate("a <thing>", adapters=[adapter], steps=1)
    assert image.size == (64, 64) and hub_cache == []


def test_an_absent_hub_model_is_named_and_no_socket_opened(
    hub_cache, photos, tmp_path, monkeypatch, capsys
):
    line = ["rite", "train", str(photos), "--trigger", "<t>", "--class", "toy"]
    monkeypatch.setattr(sys, "argv", [*line, "--base", "someone/other", "--out", "run"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as done:
        main()
    assert done.value.code == 2
    assert "'someone/other' is neither here nor on the hub" in capsys.readouterr().err
    assert hub_cache == [] and not (tmp_path / "run").exists()


def test_a_network_failure_is_an_error_of_one_line(hub_cache, photos, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between its tries
    with pytest.raises(BackboneError, match="'someone/other' is neither here nor on the hub"):
        plan_training(config_of(photos, base="someone/other"))
    assert hub_cache


class Pipeline:
    def __init__(self, fault):
        self.fault = fault

    def enable_xformers_memory_efficient_attention(self):
        if self.fault:
            raise self.fault


@pytest.mark.parametrize(
    ("cuda", "fault", "backend"),
    [
        (False, None, "sdpa"),
        (True, None, "xformers"),
        (True, ModuleNotFoundError("not installed"), "sdpa (no xformers: not installed)"),
        (True, ImportError("a.so: undefined symbol: _ZN\nmore"),
         "sdpa (no xformers: a.so: undefined symbol: _ZN)"),
        (True, OSError("libcudart.so.12"), "sdpa (no xformers: libcudart.so.12)"),
    ],
)  # fmt: skip
def test_missing_or_broken_xformers_falls_back(monkeypatch, cuda, fault, backend):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    assert choose_attention(Pipeline(fault)) == backend


def test_unsupported_precisions_fall_back(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert usable_precision("bf16", cpu) == ("bf16", "")
    assert usable_precision("fp16", cpu) == ("fp32", "precision fp32: fp16 does not train on a CPU")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    for able in (False, True):
        supported = lambda including_emulation, able=able: able  # noqa: E731
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
        found = usable_precision("bf16", cuda)
        assert found == (("bf16", "") if able else ("fp16", "precision fp16: Tesla T4 has no bf16"))
        assert usable_precision("fp16", cuda) == ("fp16", "")


def test_the_log_has_device_precision_attention_and_fallbacks(photos, tmp_path):
    plan = plan_training(config_of(photos, precision="fp16", previews={"every": 0}))
    assert rite.inspect(run_training(plan, tmp_path / "run")).info.steps == "3"
    log = (tmp_path / "run/log.txt").read_text()
    assert f"pocket on cpu ({torch.get_num_threads()} threads), fp32, attention sdpa" in log
    assert "precision fp32: fp16 does not train on a CPU" in log


@pytest.mark.slow  # processes of a launcher
def test_a_dying_process_ends_the_others_with_a_complete_checkpoint(photos, tmp_path, unused_port):
    script, run = Path(__file__).parents[1] / "train/concept.py", tmp_path / "run"
    line = [str(script), str(photos), "--trigger", "<t>", "--class", "toy", "--steps", "5000"]
    line += ["--set", "previews.every=0", "--set", "prior.weight=0", "--out", str(run)]
    line += ["--set", "checkpoints.every=1"]
    launch = ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={unused_port}"]
    process = subprocess.Popen(
        [sys.executable, *launch, *line], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    end = time.monotonic() + 400
    while not (run / "checkpoints/step-000002").exists():
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.1)
    workers = psutil.Process(process.pid).children()
    [second] = [each for each in workers if each.environ()["RANK"] == "1"]
    second.send_signal(signal.SIGKILL)
    output, _ = process.communicate(timeout=400)
    assert process.returncode != 0
    assert "another process of this run has died or hangs" in output
    assert not [each for each in workers if each.is_running()]
    with RunFolder(run) as held:
        snapshot = held.newest_snapshot()
    assert snapshot.step >= 2
    assert rite.inspect(held.checkpoints()[-1] / "adapter.safetensors").info.steps


WHOLE = {
    "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "one", "MASTER_PORT": "29500",
}  # fmt: skip


def test_a_process_has_a_rank_if_all_launcher_variables_are_set():
    assert read_rank(WHOLE) == ProcessRank(1, 2, 0) and ignored_variables_note(WHOLE) == ""
    for name in WHOLE:
        for value in ({}, {name: ""}):
            part = {key: each for key, each in WHOLE.items() if key != name} | value
            assert read_rank(
                part
            ) == ProcessRank() and f"would set {name} too" in ignored_variables_note(part)
    assert (
        read_rank({}) == ProcessRank()
        and ignored_variables_note({}) == ignored_variables_note({"MASTER_PORT": "1"}) == ""
    )
    wrong = {"RANK": "2", "WORLD_SIZE": "0", "LOCAL_RANK": "-1", "MASTER_PORT": "x"}
    for name, value in wrong.items():
        with pytest.raises(RunError, match=f"contradict each other .*{name}={value}"):
            read_rank(WHOLE | {name: value})


@pytest.mark.parametrize(
    "left",
    [
        {"RANK": "1"},
        {"WORLD_SIZE": "2"},
        {"LOCAL_RANK": "0"},
        {"RANK": "junk", "WORLD_SIZE": "", "MASTER_ADDR": "one"},
        {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"},
        {"PMI_SIZE": "2", "PMI_RANK": "1"},
        {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"},
        {"MV2_COMM_WORLD_SIZE": "2"},
    ],
    ids=lambda left: ",".join(left),
)
def test_incomplete_launcher_variables_are_ignored_with_a_note(photos, tmp_path, monkeypatch, left):
    PartialState._reset_state()  # as in a fresh process
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    adapter = train(photos, tmp_path / "run", steps=1, previews={"every": 0})
    assert rite.inspect(adapter).info.steps == "1"
    assert PartialState().num_processes == 1
    log = (tmp_path / "run/log.txt").read_text()
    assert "one process: " in log and " ignored" in log
    assert all(os.environ[name] == value for name, value in left.items())


def test_contradictory_launcher_variables_are_an_error(photos, tmp_path, monkeypatch, capsys):
    for name, value in (WHOLE | {"RANK": "2"}).items():
        monkeypatch.setenv(name, value)
    line = ["rite", "train", str(photos), "--trigger", "<t>", "--class", "toy"]
    monkeypatch.setattr(sys, "argv", [*line, "--out", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as done:
        main()
    assert done.value.code == 2 and not (tmp_path / "run").exists()
    assert "contradict each other" in capsys.readouterr().err
