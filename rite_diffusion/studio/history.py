"""The pictures that a workspace has made, and what their parameters say of the page's fields."""

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from rite_diffusion.errors import StudioError
from rite_diffusion.generation.metadata import Parameters, read_parameters
from rite_diffusion.studio.library import by_digest
from rite_diffusion.studio.workspace import Workspace

SHOWN = 60  # newest pictures


@dataclass(frozen=True)
class Used:
    """An adapter of a picture; `name` is empty where the library does not have it."""

    file: str
    weight: float
    name: str


@dataclass(frozen=True)
class Restored:
    """A picture's parameters, and its adapters as the library knows them."""

    parameters: Parameters
    adapters: list[Used]

    def missing(self) -> list[str]:
        """Files of the adapters that the library does not have."""
        return [each.file for each in self.adapters if not each.name]


def newest(space: Workspace) -> list[Path]:
    """The newest pictures, newest first."""
    made = [path for path in space.folder("outputs").glob("*.png") if path.stem.isdecimal()]
    return sorted(made, key=lambda path: int(path.stem), reverse=True)[:SHOWN]


def parameters_of(picture: Path) -> Parameters:
    """What a picture was made with; StudioError where the file does not say."""
    try:
        return read_parameters(picture)
    except (KeyError, ValueError, Image.UnidentifiedImageError, OSError):
        raise StudioError(
            f"{picture.name} does not tell how it was made: drop a PNG that was made here. "
            "Other programs take such notes out."
        ) from None


def restore(space: Workspace, picture: Path) -> Restored:
    """`parameters_of` a picture, with its adapters as the library knows them."""
    parameters, known = parameters_of(picture), by_digest(space)
    adapters = [
        Used(each.file, each.weight, known.get(each.sha256, "")) for each in parameters.adapters
    ]
    return Restored(parameters, adapters)
