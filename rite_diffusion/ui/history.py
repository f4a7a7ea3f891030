"""The pictures that a workspace has made, and what their parameters say of the page's fields."""

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from rite_diffusion.generation.metadata import Parameters, read_parameters
from rite_diffusion.types import StudioError
from rite_diffusion.ui.library import by_digest
from rite_diffusion.ui.workspace import Workspace

SHOWN = 60  # newest pictures


@dataclass(frozen=True)
class Restored:
    """A picture's parameters with its adapters as the library knows them."""

    parameters: Parameters
    adapters: list[tuple[str, float]]
    missing: list[str]  # adapters that the library does not have


def newest(space: Workspace) -> list[Path]:
    """The newest pictures, newest first."""
    made = [path for path in space.folder("outputs").glob("*.png") if path.stem.isdigit()]
    return sorted(made, key=lambda path: int(path.stem), reverse=True)[:SHOWN]


def restore(space: Workspace, picture: Path) -> Restored:
    """What a picture was made with; StudioError where the file does not say."""
    try:
        parameters = read_parameters(picture)
        chosen = [(each["sha256"], each["file"], each["weight"]) for each in parameters.adapters]
    except (KeyError, TypeError, ValueError, Image.UnidentifiedImageError, OSError):
        raise StudioError(
            f"{picture.name} does not tell how it was made: drop a PNG that was made here. "
            "Other programs take such notes out."
        ) from None
    known = by_digest(space)
    return Restored(
        parameters,
        [(known[digest], float(weight)) for digest, _, weight in chosen if digest in known],
        [str(file) for digest, file, _ in chosen if digest not in known],
    )
