"""Pictures of a workspace, and the parameters they carry."""

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
    """An adapter of a picture; `name` is empty where the library lacks it."""

    file: str
    weight: float
    name: str


@dataclass(frozen=True)
class Restored:
    """A picture's parameters, and its adapters by their names in the library."""

    parameters: Parameters
    adapters: list[Used]

    def missing(self) -> list[str]:
        """Files of the adapters that the library lacks."""
        return [each.file for each in self.adapters if not each.name]


def newest(space: Workspace) -> list[Path]:
    """The newest pictures, newest first."""
    made = [path for path in space.folder("outputs").glob("*.png") if path.stem.isdecimal()]
    return sorted(made, key=lambda path: int(path.stem), reverse=True)[:SHOWN]


def parameters_of(picture: Path) -> Parameters:
    """The parameters that a PNG carries; StudioError where it has none."""
    try:
        return read_parameters(picture)
    except (KeyError, ValueError, Image.UnidentifiedImageError, OSError):
        raise StudioError(
            f"{picture.name} carries no parameters: drop a PNG that was made here. "
            "Other programs remove them when they save."
        ) from None


def restore(space: Workspace, picture: Path) -> Restored:
    """`parameters_of` a picture, with its adapters' names in the library."""
    parameters, known = parameters_of(picture), by_digest(space)
    adapters = [
        Used(each.file, each.weight, known.get(each.sha256, "")) for each in parameters.adapters
    ]
    return Restored(parameters, adapters)
