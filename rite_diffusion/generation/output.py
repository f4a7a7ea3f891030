"""Paths of pictures."""

from collections.abc import Iterable
from pathlib import Path

from rite_diffusion.errors import ConfigError
from rite_diffusion.files.writing import check_outputs, folder_output, user_path, write_atomically


def picture_target(out: str | Path, num: int, sources: Iterable[Path]) -> Path:
    """The path for `num` pictures: a `.png` for one, or a folder.

    ConfigError for one file for several pictures, OutputError where it cannot be written.
    """
    path = user_path(out)
    if path.suffix.lower() == ".png" and not path.is_dir():
        if num > 1:
            raise ConfigError(f"{path} is one file for {num} pictures: pass a folder as --out.")
        check_outputs([path], sources=sources)
        return path
    return folder_output(path)


def write_next(folder: Path, content: bytes) -> Path:
    """Write a PNG as the next free `00000.png`, which other processes cannot take; its path."""
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        numbers = [int(path.stem) for path in folder.glob("*.png") if path.stem.isdecimal()]
        path = folder / f"{max(numbers, default=-1) + 1:05d}.png"
        try:
            path.touch(exist_ok=False)
        except FileExistsError:
            continue
        write_atomically(path, content)
        return path
