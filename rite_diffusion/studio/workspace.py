"""The folder that the studio works in; names that a page sends cannot lead out of it.

photos/<set>/  runs/<run>/  adapters/<name>.safetensors  outputs/00000.png  models/  trash/
users/<name>/ holds all of this for each user, where the studio has logins.
"""

import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from rite_diffusion.errors import StudioError

LONGEST_NAME = 64  # characters
_NAME = re.compile(r"\w(?:[\w .+()-]*[\w+)])?")
_NO_NAME = re.compile(r"[^\w .+()-]+")
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def checked_name(text: str) -> str:
    """The text; StudioError unless it is a valid file name on every system."""
    if len(text) > LONGEST_NAME or not _NAME.fullmatch(text):
        raise StudioError(
            f"'{text[:LONGEST_NAME]}' is not a name: use up to {LONGEST_NAME} letters, digits, "
            "spaces, dots and dashes, and begin with a letter or digit."
        )
    return text


def name_from(text: str, fallback: str) -> str:
    """The text without the characters that names cannot have; `fallback` if none are left."""
    name = _NO_NAME.sub("", text)[:LONGEST_NAME].strip(" .-(")
    return name if _NAME.fullmatch(name) else fallback


@dataclass(frozen=True)
class Workspace:
    """The folders of one user, made at first use."""

    root: Path

    def folder(self, name: str) -> Path:
        """The path of one of the folders in the module's docstring."""
        path = self.root / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def find(self, folder: str, name: str) -> Path:
        """The path of a name in a folder; StudioError where it does not exist or leads out."""
        home = self.folder(folder)
        path = home / checked_name(name)
        if not path.exists() or not path.resolve().is_relative_to(home.resolve()):
            raise StudioError(f"there is no '{name}' among the {folder}: choose one from the list.")
        return path

    def new(self, folder: str, name: str, suffix: str = "", *beside: str) -> Path:
        """A path that does not exist yet: the name, or the name with a number.

        Nor do its paths with the suffixes `beside`, for files that belong to it.
        """
        home = self.folder(folder)
        stem = checked_name(name)
        names = (stem, *(f"{stem[: LONGEST_NAME - 5]}-{i}" for i in range(2, 10_000)))
        free = (n for n in names if not any((home / (n + s)).exists() for s in (suffix, *beside)))
        return home / f"{next(free)}{suffix}"

    def names(self, folder: str) -> list[str]:
        """Names in a folder, newest first, without hidden ones."""
        found = [path for path in self.folder(folder).iterdir() if _NAME.fullmatch(path.name)]
        return [path.name for path in sorted(found, key=_changed, reverse=True)]

    def base(self, text: str) -> str | None:
        """The base model that a user names, None for an empty text.

        StudioError for anything but pocket, a hub id or a name in `models/`: no other paths.
        """
        text = text.strip()
        if text in ("", "pocket"):
            return text or None
        if text in self.names("models"):
            return str(self.find("models", text))
        if _HUB_ID.fullmatch(text) and not Path(text).exists():
            return text
        raise StudioError(
            f"no base model '{text}': write pocket, a hub id (owner/model), or the name of a file "
            f"or folder in {self.folder('models')}."
        )

    def move_to_trash(self, home: Path, *beside: Path) -> None:
        """Move a file or folder, and the files beside it that belong to it, into the trash."""
        place = self.folder("trash") / f"{time.time_ns()}"
        (place / "held").mkdir(parents=True)
        (place / "from").write_text(str(home.relative_to(self.root)), encoding="utf-8")
        for path in (home, *beside):
            shutil.move(path, place / "held" / path.name)

    def last_in_trash(self, folder: str = "") -> str:
        """The name of what `restore_from_trash` would restore, "" for nothing.

        Also "" where `folder` is given and it lay elsewhere.
        """
        places = sorted(self.folder("trash").iterdir())
        home = Path((places[-1] / "from").read_text(encoding="utf-8")) if places else Path()
        return title_of(home) if not folder or home.parts[:1] == (folder,) else ""

    def restore_from_trash(self) -> Path:
        """Undo the last `move_to_trash` and return the path.

        StudioError where the trash is empty or the name is taken, but by an empty folder.
        """
        places = sorted(self.folder("trash").iterdir())
        if not places:
            raise StudioError("the trash is empty: there is nothing to undo.")
        home = self.root / (places[-1] / "from").read_text(encoding="utf-8")
        back = {path: home.with_name(path.name) for path in (places[-1] / "held").iterdir()}
        for place in back.values():
            if place.is_dir() and not any(place.iterdir()):
                place.rmdir()
            if place.exists():
                raise StudioError(f"'{title_of(place)}' exists again: rename it first, then undo.")
        for path, place in back.items():
            shutil.move(path, place)
        shutil.rmtree(places[-1])
        return home


def title_of(path: str | Path) -> str:
    """The name of a file or folder as the page shows it: without `.safetensors`."""
    return Path(path).name.removesuffix(".safetensors")


def _changed(path: Path) -> float:
    return path.stat().st_mtime
