"""Training jobs: processes that outlive the page and the studio, and leave no orphans."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from rite_diffusion.errors import StudioError
from rite_diffusion.studio.jobs import (
    JobQueue,
    JobRecord,
    read_job,
    state_of,
    write_job,
)
from rite_diffusion.studio.presets import training_settings
from rite_diffusion.studio.progress import POINTS, loss_curves, rate_curve, read_progress, thin
from rite_diffusion.training.launch import last_line
from rite_diffusion.training.lock import Lock
from studio_server import ENDLESS, SHORT, end, output, pid_of, step_of, wait_for, wait_for_state


@pytest.fixture
def runs(tmp_path):
    folder = tmp_path / "runs"
    folder.mkdir()
    yield folder
    for run in folder.iterdir():
        end(run)


@pytest.fixture
def queue(runs) -> JobQueue:
    return new_queue(runs)


def new_queue(runs: Path, devices=("cpu",)) -> JobQueue:
    """A queue as a studio that has just been started has it."""
    return JobQueue(lambda: sorted(runs.iterdir()), lambda: list(devices))


def settings(photos: Path, lines: str) -> dict:
    needed = {"photos": str(photos), "trigger": "<t>", "class_noun": "toy", "base": "pocket"}
    return training_settings("quick", needed, {}, lines)


@pytest.mark.slow  # a training in a process of its own
def test_a_job_survives_its_studio_and_can_be_stopped(photos, runs, queue):
    run = runs / "toy"
    queue.submit(run, settings(photos, ENDLESS))
    assert state_of(run) == "queued"
    queue.start_waiting()
    wait_for_state(run, "running")
    wait_for(lambda: step_of(run) >= 3, "three steps")
    later = new_queue(runs)  # the studio was restarted: all it knows are the folders
    assert state_of(run) == "running"
    later.ask(run, "save")
    later.ask(run, "sample")
    wait_for(lambda: list((run / "previews").iterdir()), "previews that were asked for")
    wait_for(lambda: not list((run / "requests").iterdir()), "the requests to be taken")
    process = psutil.Process(pid_of(run))
    assert os.getpgid(process.pid) == process.pid != os.getpgid(0)
    assert later.stop(run) == "running"
    assert later.stop(run) in (
        "stopping",
        "stopped",
    )  # asked twice, it still ends in its own time
    wait_for_state(run, "stopped")
    assert later.stop(run) == "stopped"
    assert read_progress(run).step == json.loads((run / "status.json").read_text())["step"]
    assert "stopped at step" in output(run) and not orphans(run)
    before = step_of(run)
    later.resume(run)
    later.start_waiting()
    wait_for(lambda: step_of(run) > before, "steps after the resume")
    assert "goes on after step" in (run / "log.txt").read_text()


def orphans(run: Path) -> list[psutil.Process]:
    """Living processes that work on a run."""
    found = []
    for process in psutil.process_iter():
        try:
            line = process.cmdline()
            if str(run) in line and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.mark.slow  # three trainings in processes of their own
def test_queued_jobs_run_one_at_a_time_in_order(photos, runs, queue):
    first, second, third = (runs / name for name in ("c", "b", "a"))
    for run in (first, second, third):
        queue.submit(run, settings(photos, SHORT))
        time.sleep(0.01)
    assert queue.waiting() == [first, second, third]
    queue.start_waiting()
    queue.start_waiting()
    assert state_of(first) in ("starting", "preparing", "running")
    assert queue.waiting() == [second, third]
    queue.stop(second)  # leaves the queue
    assert state_of(second) == "stopped" and queue.waiting() == [third]
    wait_for_state(first, "finished")
    deadline = time.monotonic() + 60  # its process has yet to end
    while state_of(third) == "queued" and time.monotonic() < deadline:
        queue.start_waiting()
        time.sleep(0.05)
    assert state_of(third) in ("starting", "preparing", "running")
    with pytest.raises(StudioError, match="finished"):
        queue.resume(first)
    assert queue.stop(first) == "finished"
    wait_for_state(third, "finished")


def test_a_run_that_cannot_start_says_why(tmp_path, runs, queue):
    (tmp_path / "empty").mkdir()
    queue.submit(runs / "toy", settings(tmp_path / "empty", SHORT))
    queue.start_waiting()
    wait_for_state(runs / "toy", "failed")
    assert last_line(runs / "toy").startswith("no images in")
    assert read_progress(runs / "toy").last_line.endswith(
        "the folder that directly holds the photos."
    )


def test_a_jobs_process_is_identified_by_number_and_start_time(runs):
    run = runs / "toy"
    run.mkdir()
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started = psutil.Process(process.pid).create_time()
    (run / "status.json").write_text(
        json.dumps({"state": "running", "step": 1, "total": 9, "pid": process.pid})
    )
    job = JobRecord("run", time.time(), process.pid, started, "cpu")
    write_job(run, job)
    assert read_job(run) == job
    assert json.loads((run / "job.json").read_text()).keys() == set(
        "wish since pid born device".split()
    )
    assert state_of(run) == "running"
    write_job(run, replace(job, started=started - 100))  # another process has that number now
    assert state_of(run) == "failed"
    write_job(run, job)
    process.send_signal(signal.SIGKILL)
    wait_for(lambda: state_of(run) == "failed", "the zombie to count as dead")
    process.communicate()
    assert state_of(run) == "failed"
    write_job(run, replace(job, desired="stop"))
    assert state_of(run) == "stopped"


def test_a_second_request_to_stop_kills_a_hanging_run(runs, monkeypatch):
    run = runs / "toy"
    run.mkdir()
    code = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1); input()"
    process = subprocess.Popen(
        [sys.executable, "-uc", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip
    process.stdout.read(1)
    started = psutil.Process(process.pid).create_time()
    write_job(run, JobRecord("run", time.time(), process.pid, started, "cpu"))
    queue = new_queue(runs)
    queue.stop(run)
    queue.stop(run)
    assert process.poll() is None
    write_job(run, replace(read_job(run), since=time.time() - 60))
    queue.stop(run)
    assert process.wait(timeout=600) == -signal.SIGKILL
    process.stdin.close()
    process.stdout.close()


def test_a_studio_run_resumed_in_a_terminal_counts_as_running(runs):
    run, lock = runs / "toy", Lock(runs / "toy/lock")
    run.mkdir()
    write_job(run, JobRecord("stop", time.time(), 2**22 - 1, 1.0, "cpu"))
    (run / "status.json").write_text(json.dumps({"state": "running", "pid": 1}))
    assert state_of(run) == "stopped"
    lock.acquire()
    assert state_of(run) == "running"
    with pytest.raises(StudioError, match="started in a terminal"):
        new_queue(runs).stop(run)
    with pytest.raises(StudioError, match="is running: only a stopped or failed run"):
        new_queue(runs).resume(run)
    lock.release()
    assert state_of(run) == "stopped"


def test_progress_is_read_from_runs_of_the_terminal_and_partial_files(runs):
    run = runs / "toy"
    run.mkdir()
    assert read_progress(run).metrics == []
    rows = [{"step": i, "loss": 1 / i, "rate": 1e-3, "images_per_second": 4.0}
            for i in range(1, 1001)]  # fmt: skip
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (run / "metrics.jsonl").write_text(lines + '{"step": 10')
    (run / "config.toml").write_text("steps = 2000\nbatch = 8")
    (run / "status.json").write_text(
        json.dumps({"state": "running", "step": 900, "total": 2000, "pid": os.getpid()})
    )
    assert read_progress(run).state == "failed"  # a process of that number lives, but holds no lock
    lock = Lock(run / "lock")
    lock.acquire()
    progress = read_progress(run)
    assert (progress.state, progress.step, progress.total) == ("running", 1000, 2000)
    with pytest.raises(StudioError, match="started in a terminal"):
        new_queue(runs).stop(run)
    assert progress.seconds_left == 1000 * 2.0 and progress.left() == "about 0:33:20 left"
    assert 0.001 < progress.loss < 0.01
    curves = loss_curves(progress.metrics)
    assert set(curves["curve"]) == {"each step", "smoothed"}
    assert curves["step"].max() == 1000 and len(curves) < 3 * POINTS
    assert rate_curve(progress.metrics)["step"].iloc[-1] == 1000
    assert thin([(1, 1.0)]) == [(1, 1.0)] and thin([]) == []
    lock.release()
