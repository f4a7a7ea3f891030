"""`rite.train`: a photo folder becomes a concept adapter."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rite_diffusion.files.writing import folder_output
from rite_diffusion.training.plan import configure, plan_training
from rite_diffusion.training.run import default_run, run_training
from rite_diffusion.training.trainer import StepReport


def train(
    photos: str | Path,
    *,
    trigger: str,
    class_noun: str,
    base: str = "pocket",
    preset: str | None = None,
    out: str | Path | None = None,
    listen: Callable[[StepReport], None] = lambda report: None,
    override: bool = False,
    **settings: Any,
) -> Path:
    """Train a concept adapter from a photo folder and return its file's path.

    `settings` are those of `TrainConfig`: `steps=200, optim={"lr": 1e-3}`. The run folder `out`
    defaults to `runs/<name of the photo folder>`; a stopped run there goes on.
    """
    wanted = {"photos": str(photos), "trigger": trigger, "class_noun": class_noun, "base": base}
    folder = folder_output(out) if out else None
    plan = plan_training(configure(wanted | settings, preset))
    return run_training(plan, folder or default_run(plan), listen, override)
