"""Where pictures are written."""

import os
from pathlib import Path

from rite_diffusion.errors import ConfigError, RiteError


def output_target(path: Path, num: int) -> Path:
    """A folder, made if need be, or a `.png` in one; RiteError where it cannot be written."""
    single = path.suffix.lower() == ".png"
    if single and num > 1:
        raise ConfigError(f"{path} is one file for {num} pictures: pass a folder as --out.")
    folder = path.parent if single else path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".rite-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        reason = error.strerror or str(error)
        raise RiteError(f"cannot write to {folder}: {reason}. Choose another --out.") from None
    return path


def next_file(folder: Path) -> Path:
    """The next free `00000.png` of a folder."""
    numbers = [int(path.stem) for path in folder.glob("*.png") if path.stem.isdigit()]
    return folder / f"{max(numbers, default=-1) + 1:05d}.png"
