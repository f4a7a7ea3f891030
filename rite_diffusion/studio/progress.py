"""The progress of a training, read from its run folder for the page."""

import json
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

import pandas

from rite_diffusion.files.writing import read_json
from rite_diffusion.studio.jobs import settings_of, state_of
from rite_diffusion.training.launch import last_line

POINTS = 240  # of a curve
RECENT = 20  # steps over which the speed is averaged
SMOOTHING = 0.9  # decay of the exponential mean of the loss
LAST_LINES = 40  # of the log


@dataclass(frozen=True)
class Progress:
    """The state of a run at one moment."""

    name: str
    state: str
    step: int
    total: int
    loss: float | None  # smoothed
    seconds_left: float | None
    last_line: str  # of its output: why it failed, or what it does before the first step
    metrics: list[dict[str, Any]]
    previews: list[Path]
    log: str

    def left(self) -> str:
        """The remaining time in words, empty where unknown."""
        if self.seconds_left is None:
            return ""
        return f"about {timedelta(seconds=round(self.seconds_left))} left"


def read_progress(run: Path) -> Progress:
    """Everything that the page shows of a run."""
    state, metrics = state_of(run), _metrics(run / "metrics.jsonl")
    step = metrics[-1]["step"] if metrics else 0
    config = settings_of(run)
    total = read_json(run / "status.json").get("total") or config.get("steps") or 0
    going = state in ("running", "stopping") and metrics
    return Progress(
        name=run.name,
        state=state,
        step=step,
        total=total,
        loss=_smoothed([row["loss"] for row in metrics])[-1] if metrics else None,
        seconds_left=(total - step) * _seconds_per_step(metrics, config) if going else None,
        last_line=last_line(run) if state in ("failed", "starting", "preparing") else "",
        metrics=metrics,
        previews=sorted((run / "previews").glob("step-*.png"), reverse=True),
        log=_tail(run / "log.txt"),
    )


def _metrics(path: Path) -> list[dict[str, Any]]:
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:  # the line that is being written
            break
    return rows


def _seconds_per_step(metrics: list[dict[str, Any]], config: dict[str, Any]) -> float:
    pictures = config.get("batch", 1) * config.get("accumulate", 1)
    return pictures / median(row["images_per_second"] for row in metrics[-RECENT:])


def _smoothed(values: list[float]) -> list[float]:
    """Exponential means with bias correction (Kingma & Ba 2015, Sec. 3)."""
    total, weight, means = 0.0, 0.0, []
    for value in values:
        total = SMOOTHING * total + (1 - SMOOTHING) * value
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        means.append(total / weight)
    return means


def _tail(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    return "\n".join(lines[-LAST_LINES:])


def loss_curves(metrics: list[dict[str, Any]]) -> pandas.DataFrame:
    """A table of step, loss and curve: each step's loss, the smoothed one, the held-out photos'."""
    steps = [row["step"] for row in metrics]
    losses = [row["loss"] for row in metrics]
    held_out = [(row["step"], row["validation"]) for row in metrics if "validation" in row]
    curves = {
        "each step": list(zip(steps, losses, strict=True)),
        "smoothed": list(zip(steps, _smoothed(losses), strict=True)),
        "held out": held_out,
    }
    rows = [(step, loss, name) for name, points in curves.items() for step, loss in thin(points)]
    return pandas.DataFrame(rows, columns=pandas.Index(["step", "loss", "curve"]))


def rate_curve(metrics: list[dict[str, Any]]) -> pandas.DataFrame:
    """A table of step and learning rate."""
    points = thin([(row["step"], row["rate"]) for row in metrics])
    return pandas.DataFrame(points, columns=pandas.Index(["step", "rate"]))


def thin(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """About `POINTS` of the points at most, evenly spaced, with the last."""
    stride = max(1, len(points) // POINTS)
    return points[-1::-stride][::-1]
