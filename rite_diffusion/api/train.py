"""`rite.train`: a concept adapter from photo folders."""

from collections.abc import Callable
from pathlib import Path
from typing import Unpack

from rite_diffusion.config.typed import TrainSettings
from rite_diffusion.files.writing import folder_output
from rite_diffusion.training.plan import plan_training
from rite_diffusion.training.run import default_run, run_training
from rite_diffusion.training.settings import configure
from rite_diffusion.training.trainer import StepReport


def train(
    photos: str | Path | None = None,
    *,
    preset: str | None = None,
    out: str | Path | None = None,
    on_step: Callable[[StepReport], None] = lambda report: None,
    override: bool = False,
    **settings: Unpack[TrainSettings],
) -> Path:
    """Train a concept adapter from a photo folder and return its file's path.

    One concept is given by `photos`, `trigger` and `class_noun`, several by
    `dataset=[{"photos": ..., "trigger": ..., "class_noun": ...}, ...]`. Other settings are those of
    `TrainSettings`, tables as dicts: `steps=200, optim={"lr": 1e-3}`. `preset` is a preset's name
    or `.toml` file and defaults to the one for base and method. The run folder `out` defaults to
    `runs/<name of the photo folder>`. A stopped run there is resumed; where settings differ, only
    with `override`. `on_step` is called after every optimizer step. Raises RiteError for settings,
    photos and base models that cannot be used, and Stopped after Ctrl-C or SIGTERM.
    """
    wanted = dict(settings) if photos is None else {"photos": str(photos), **settings}
    folder = folder_output(out) if out else None
    plan = plan_training(configure(wanted, preset))
    return run_training(plan, folder or default_run(plan), on_step, override)
