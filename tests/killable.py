"""A training that a test kills; a module of its own, so that a fork server can load it."""

from pathlib import Path

import rite_diffusion.recipes  # noqa: F401 - everything heavy, once for all forks
from runs import train

SETTINGS = {"steps": 40, "checkpoints": {"every": 2}, "previews": {"every": 0}}


def run(photos: Path, out: Path) -> None:
    """Train with a checkpoint after every other step; goes on where it was killed."""
    train(photos, out, **SETTINGS)
