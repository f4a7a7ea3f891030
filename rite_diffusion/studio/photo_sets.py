"""Photo folders of the workspace as the Train tab shows them: pictures with their captions."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rite_diffusion.errors import StudioError
from rite_diffusion.photos.images import SUFFIXES
from rite_diffusion.studio.uploads import CAPTIONS

LONGEST_CAPTION = 2000  # characters


@dataclass(frozen=True)
class Shown:
    """A photo and what is written about it."""

    path: Path
    caption: str


def read_set(folder: Path) -> list[Shown]:
    """The photos of a set in the order of their names."""
    pictures = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    return [Shown(path, _caption(path)) for path in pictures]


def _caption(picture: Path) -> str:
    for suffix in sorted(CAPTIONS):
        path = picture.with_suffix(suffix)
        if path.is_file():
            text = path.read_text(encoding="utf-8-sig", errors="replace")
            return " ".join(text.split())[:LONGEST_CAPTION]
    return ""


def write_captions(folder: Path, rows: Sequence[Sequence[str]]) -> None:
    """Keep the captions of rows (photo, caption); an empty one leaves the photo without."""
    known = {shown.path.name: shown for shown in read_set(folder)}
    for name, text in rows:
        caption = " ".join(str(text or "").split())
        if name not in known:
            raise StudioError(f"'{name}' is no photo of this set: load the set again.")
        if len(caption) > LONGEST_CAPTION:
            raise StudioError(f"the caption of {name} is over {LONGEST_CAPTION} characters.")
        if caption == known[name].caption:
            continue
        for suffix in CAPTIONS:
            known[name].path.with_suffix(suffix).unlink(missing_ok=True)
        if caption:
            known[name].path.with_suffix(".txt").write_text(caption + "\n", encoding="utf-8")


def remove_photo(folder: Path, name: str) -> None:
    """Delete a photo of a set with its caption."""
    photo = next((shown.path for shown in read_set(folder) if shown.path.name == name), None)
    if photo is None:
        raise StudioError(f"'{name}' is no photo of this set: choose one of its pictures.")
    for suffix in CAPTIONS:
        photo.with_suffix(suffix).unlink(missing_ok=True)
    photo.unlink()
