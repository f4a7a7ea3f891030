"""Starting a training as a process of its own, on one device; its whole state is in its folder."""

import os
import subprocess
import sys
from pathlib import Path


def devices() -> list[str]:
    """The devices that can train: CUDA device numbers, or `cpu` where there are none."""
    import torch  # takes seconds, and starting a process does not need it

    return [str(index) for index in range(torch.cuda.device_count())] or ["cpu"]


def device_environment(device: str) -> dict[str, str]:
    """Environment variables of a process that works on one device."""
    chosen = {} if device == "cpu" else {"CUDA_VISIBLE_DEVICES": device}
    return os.environ | chosen | {"PYTHONUNBUFFERED": "1"}


def start_training(
    settings: Path,
    run: Path,
    environment: dict[str, str],
    preset: str | None = None,
    cwd: Path | None = None,
) -> subprocess.Popen:
    """Start `rite train` with a file of settings; what it prints goes to the run's output.txt.

    It is the leader of a process group of its own, so Ctrl-C at the parent does not reach it.
    """
    command = [sys.executable, "-P", "-m", "rite_diffusion", "train", str(settings)]
    if preset:
        command += ["--preset", preset]
    with (run / "output.txt").open("wb") as output:
        return subprocess.Popen(
            [*command, "--out", str(run)],
            cwd=cwd,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def last_line(run: Path) -> str:
    """The last line that a run's process printed, else the last of its log."""
    for path in (run / "output.txt", run / "log.txt"):
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        words = text.strip().split("\n")[-1].strip()
        if words:
            return words.removeprefix("rite: ")
    return ""
