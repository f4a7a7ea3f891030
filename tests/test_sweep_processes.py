"""Sweeps whose runs are processes, of this machine or of a Ray cluster, some of them killed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread

import psutil
import pytest
import tomlkit

import rite_diffusion as rite
from rite_diffusion.errors import RiteError
from rite_diffusion.training.lock import is_in_use
from runs import QUICK, same_run, train

LONG = {"checkpoints": {"every": 2}, "previews": {"every": 0}, "resolution": 32, "batch": 1}


def sweep_tree(photos: Path, axes: dict, **settings) -> dict:
    """A sweep over the pocket base."""
    given = QUICK | LONG | {"photos": str(photos), "trigger": "<thing>", "class_noun": "toy"}
    section = {"axes": axes, "preset": "pocket"} | settings.pop("sweep", {})
    return given | settings | {"sweep": section}


def wait_until(done: Callable[[], object], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "did not come about"
        time.sleep(0.05)


def steps_of(run: Path) -> int:
    path = run / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def owner(run: Path) -> int:
    return json.loads((run / "status.json").read_text())["pid"]


def begin(tree: dict, folder: Path) -> subprocess.Popen:
    """`rite sweep` as a process."""
    (folder / "s.toml").write_text(tomlkit.dumps(tree))
    line = [sys.executable, "-m", "rite_diffusion", "sweep", "s.toml", "--parallel", "1"]
    with (folder / "out.txt").open("a") as output:
        return subprocess.Popen(line, cwd=folder, stdout=output, stderr=output)


@pytest.mark.slow
def test_a_sweep_killed_with_its_run_goes_on_from_the_checkpoint(photos, tmp_path):
    tree = sweep_tree(photos, {"seed": [0, 1]}, steps=40)
    process = begin(tree, tmp_path)
    first, second = (tmp_path / "runs/s" / f"seed={seed}" for seed in (0, 1))
    wait_until(lambda: steps_of(first) >= 6)
    for each in (process.pid, owner(first)):
        os.kill(each, signal.SIGKILL)
    process.wait()
    wait_until(lambda: not is_in_use(first))
    done = steps_of(first)
    assert done < 40 and not second.exists()
    assert begin(tree, tmp_path).wait() == 0
    assert "goes on after step" in (first / "log.txt").read_text()
    train(photos, tmp_path / "whole", **LONG | {"steps": 40, "seed": 0})
    same_run(first, tmp_path / "whole")
    assert steps_of(second) == 40


@pytest.mark.slow
def test_a_sweep_killed_alone_finds_its_run_and_one_that_is_terminated_stops_it(photos, tmp_path):
    tree = sweep_tree(photos, {"seed": [0]}, steps=60)
    run = tmp_path / "runs/s/seed=0"
    process = begin(tree, tmp_path)
    wait_until(lambda: steps_of(run) >= 2)
    process.kill()
    process.wait()
    worker = owner(run)
    again = begin(tree, tmp_path)
    assert again.wait() == 0
    assert owner(run) == worker and steps_of(run) == 60  # it was waited for, not begun again
    longer = begin(tree | {"steps": 100_000}, tmp_path)
    wait_until(lambda: steps_of(run) > 62)
    longer.terminate()
    assert longer.wait() == 128 + signal.SIGTERM
    assert json.loads((run / "status.json").read_text())["state"] == "stopped"
    assert not is_in_use(run)


@pytest.mark.slow
def test_a_run_that_fails_or_is_killed_ends_no_other(photos, tmp_path):
    tree = sweep_tree(photos, {"photos": [str(photos), "nothing"], "seed": [0]}, steps=2)
    done = begin(tree, tmp_path)
    assert done.wait() == 1
    rows = {
        row.values["photos"]: row for row in rite.sweep_status(tree, out=tmp_path / "runs/s").rows
    }
    assert rows["photos"].state == "finished"
    assert rows["nothing"].state == "failed" and "nothing" in rows["nothing"].reason
    tree = sweep_tree(photos, {"seed": [1]}, steps=100_000)
    process = begin(tree | {"sweep": tree["sweep"]}, tmp_path)
    run = tmp_path / "runs/s/seed=1"
    wait_until(lambda: steps_of(run) >= 2)
    os.kill(owner(run), signal.SIGKILL)
    assert process.wait() == 1
    assert "its process was killed by SIGKILL" in (tmp_path / "out.txt").read_text()


# --- Ray ------------------------------------------------------------------------------------------


@pytest.fixture
def cluster(monkeypatch):
    """A Ray cluster of three nodes on this machine: a head without CPUs, two with one each."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_raylet_start_wait_time_s", "200")  # on a busy machine
    monkeypatch.setenv("RAY_worker_niceness", "0")  # 15 starves them there
    memory = {"object_store_memory": 80 * 1024**2}
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0} | memory)
    for _ in range(2):
        nodes.add_node(num_cpus=1, **memory)
    yield nodes
    nodes.shutdown()


@pytest.mark.slow
def test_a_cluster_runs_side_by_side_and_goes_on_where_a_worker_is_killed(
    photos, tmp_path, cluster, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    tree = sweep_tree(photos, {"photos": ["photos", "nothing"], "seed": [0, 1]}, steps=30)
    first, other = (tmp_path / "runs/sweep" / f"photos=photos,seed={seed}" for seed in (0, 1))
    killed: list[int] = []

    def kill() -> None:
        wait_until(lambda: steps_of(first) >= 6)
        killed.append(owner(first))
        os.kill(killed[0], signal.SIGKILL)

    killer = Thread(target=kill)
    killer.start()
    result = rite.sweep(tree, ray=cluster.address)
    killer.join()
    states = {row.name: (row.state, row.reason) for row in result.rows}
    for seed in (0, 1):
        assert states[f"photos=photos,seed={seed}"] == ("finished", "")
        state, reason = states[f"photos=nothing,seed={seed}"]
        assert state == "failed" and "nothing" in reason
    assert owner(first) != killed[0] and not psutil.pid_exists(killed[0])
    assert killed[0] != owner(other)  # both ran at once, each in a worker of its own
    assert "goes on after step" in (first / "log.txt").read_text()
    train(photos, tmp_path / "whole", **LONG | {"steps": 30, "seed": 0})
    same_run(first, tmp_path / "whole")


def test_a_cluster_that_is_not_there_is_told(photos, tmp_path, monkeypatch):
    tree = sweep_tree(photos, {"seed": [0]}, steps=2)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RiteError, match=r"pip install 'rite-diffusion\[cluster\]'"):
        rite.sweep(tree, out=tmp_path / "out", ray="auto")
    assert not (tmp_path / "out").exists()
