"""Two trainers, each in a process of its own and watched from outside: ours and diffusers' script.

How many steps are done is read off what each side writes anyway (our metrics.jsonl, the peer's
progress bar), every 10 ms. Images per second are those from the end of an early step to the end of
the last, so that neither side's start counts, nor what it writes at its end.
"""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tomlkit
from machine import memory_mib

CLI = "from rite_diffusion.cli.app import main; main()"
CONCEPT = {"trigger": "<thing>", "class_noun": "thing"}
CAPTION = "a photo of a <thing>"
EARLY = 5  # steps before the clock starts
RATE = 1e-4
PRECISIONS = {"fp32": "no", "fp16": "fp16", "bf16": "bf16"}  # ours -> the peer's


@dataclass(frozen=True)
class Case:
    """What both sides train."""

    base: Path  # a diffusers folder
    photos: Path  # a folder of pictures and nothing else
    resolution: int  # pixels
    batch: int
    steps: int  # more than EARLY
    rank: int
    precision: str
    text_encoder: bool  # trained along


@dataclass(frozen=True)
class Run:
    """What was seen of one run."""

    images_per_second: float
    mib_of_steps: float  # most memory held after the early steps and before the last
    peak_mib_of_steps: float  # most memory up to the last step, the start's included
    seconds: float  # of the whole process


def preset(case: Case, folder: Path) -> Path:
    """A preset file with our settings of a case; all others are the defaults."""
    settings = {
        "resolution": case.resolution,
        "batch": case.batch,
        "precision": case.precision,
        "cache": False,
        "templates": [CAPTION],
        "lora": {"rank": case.rank, "text_encoder": case.text_encoder},
        "optim": {"lr": RATE, "lr_text_encoder": RATE, "schedule": "constant", "warmup": 0},
        "previews": {"every": 0},
        "checkpoints": {"every": 500},  # the peer's default
    }
    path = folder / "preset.toml"
    path.write_text(tomlkit.dumps(settings))
    return path


def run_ours(case: Case, folder: Path) -> Run:
    """A run of `rite train` in an empty folder."""
    options = {
        "base": case.base,
        "trigger": CONCEPT["trigger"],
        "class": CONCEPT["class_noun"],
        "preset": preset(case, folder),
        "steps": case.steps,
        "out": folder / "run",
    }
    metrics = folder / "run" / "metrics.jsonl"

    def steps_done() -> int:
        return metrics.read_bytes().count(b"\n") if metrics.exists() else 0

    command = ["-c", CLI, "train", str(case.photos), *_flags(options)]
    return _watch(command, folder / "log", steps_done, case)


def run_peer(script: Path, case: Case, folder: Path) -> Run:
    """A run of diffusers' script in an empty folder.

    A text encoder that is not trained is not run at each step either: the script's fastest way.
    """
    options = {
        "pretrained_model_name_or_path": case.base,
        "instance_data_dir": case.photos,
        "instance_prompt": CAPTION,
        "output_dir": folder / "run",
        "resolution": case.resolution,
        "train_batch_size": case.batch,
        "max_train_steps": case.steps,
        "rank": case.rank,
        "learning_rate": RATE,
        "lr_warmup_steps": 0,
        "mixed_precision": PRECISIONS[case.precision],
        "seed": 0,
    }
    log = folder / "log"

    def steps_done() -> int:
        counts = re.findall(rb"Steps:[^\r\n]*?(\d+)/\d+ \[", log.read_bytes())
        return max(map(int, counts), default=0)

    variant = "--train_text_encoder" if case.text_encoder else "--pre_compute_text_embeddings"
    return _watch([str(script), *_flags(options), variant], log, steps_done, case)


def _flags(options: dict[str, object]) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def _watch(command: list[str], log: Path, steps_done: Callable[[], int], case: Case) -> Run:
    """Run Python with a command; RuntimeError with the end of its output where it fails."""
    start = time.perf_counter()
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, *command], stdout=out, stderr=out, env=environment
        )
    seen: dict[int, float] = {}  # steps done -> when
    held, peak_of_steps = 0.0, 0.0
    while True:
        ended, status, _ = os.wait4(process.pid, os.WNOHANG)
        if ended:
            break
        done = steps_done()
        seen.setdefault(done, time.perf_counter())
        if done < case.steps:
            peak_of_steps = memory_mib(process.pid, "VmHWM")
        if EARLY <= done < case.steps:
            held = max(held, memory_mib(process.pid, "VmRSS"))
        time.sleep(0.01)
    if status:
        raise RuntimeError(f"{command[:2]} ended with status {status}:\n{log.read_text()[-3000:]}")
    first = min(step for step in seen if step >= EARLY)
    return Run(
        case.batch * (case.steps - first) / (seen[case.steps] - seen[first]),
        held,
        peak_of_steps,
        time.perf_counter() - start,
    )
