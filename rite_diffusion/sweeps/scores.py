"""Scores of a run, by which candidates are dropped and the best is told."""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rite_diffusion.config import TrainConfig


@dataclass(frozen=True)
class Score:
    """A figure of a run folder; lower is better, unless `higher_is_better`."""

    read: Callable[[Path, int], float | None]  # of a run folder after so many steps
    refusal: Callable[[TrainConfig], str]  # why a training would have none, else empty
    higher_is_better: bool = False

    def rank(self, value: float) -> float:
        """A number that is lower for a better score."""
        return -value if self.higher_is_better else value


def read_metrics(run: Path) -> Iterator[dict[str, Any]]:
    """The lines of metrics.jsonl, without one that a crash has cut."""
    path = run / "metrics.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue


def validation_loss(run: Path, steps: int) -> float | None:
    """The last loss on held-out photos in the first `steps` steps; None without a finite one."""
    last = None
    for line in read_metrics(run):
        if line["step"] <= steps and math.isfinite(line.get("validation", math.nan)):
            last = line["validation"]
    return last


def _no_held_out_photos(config: TrainConfig) -> str:
    if config.validation.photos:
        return ""
    return "the score is the validation loss, and no photos are held out: set validation.photos"


# Name in SWEEP.toml -> score.
SCORES = {"validation": Score(validation_loss, _no_held_out_photos)}
