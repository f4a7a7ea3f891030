"""What lies in a photo folder: the pictures with their sidecars, and all that is not used.

Pictures lie in the folder itself; or all of them in subfolders `10_name` as kohya's tools have
them, whose number says how often an epoch shows each; or in subfolders that `metadata.jsonl` names.
"""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rite_diffusion.errors import PhotoFolderError
from rite_diffusion.files.writing import reading
from rite_diffusion.photos.captions import TABLE, read_caption, read_table
from rite_diffusion.photos.images import SUFFIXES
from rite_diffusion.photos.sidecars import (
    MASK_FOLDER,
    Unused,
    caption_owners,
    is_caption,
    is_mask,
    is_picture,
    mask_owners,
)

MOST_REPEATS = 1000
_REPEATED = re.compile(r"(\d+)_.+", re.ASCII)


@dataclass(frozen=True)
class Picture:
    """A picture file with what is written about it; whether it is one is still to be seen."""

    path: Path
    repeats: int = 1
    caption: str = ""  # its own; empty where it has none
    caption_from: Path | None = None
    mask: Path | None = None


@dataclass(frozen=True)
class Listing:
    """The pictures of a folder in the order of their names, and the files that are not used."""

    pictures: list[Picture]
    unused: list[Unused]
    folders: list[str]  # names of subfolders, for a reader who meant one of them


@dataclass
class _Place:
    """The files of one folder, by what they are."""

    path: Path
    repeats: int = 1
    pictures: list[Path] = field(default_factory=list)
    captions: list[Path] = field(default_factory=list)
    masks: list[Path] = field(default_factory=list)
    table: Path | None = None
    folders: list[Path] = field(default_factory=list)
    unused: list[Unused] = field(default_factory=list)


def list_pictures(root: Path) -> Listing:
    """What lies in a photo folder; nothing but captions is read.

    Raises PhotoFolderError where the folder or a caption cannot be read, a caption file is not
    UTF-8, or a folder's name would show its pictures more than 1,000 times.
    """
    with reading(root, PhotoFolderError):
        if not root.is_dir():
            what = "is a file" if root.exists() else "does not exist"
            raise PhotoFolderError(
                f"{root} {what}. Pass the folder that directly holds the photos."
            )
        places = _places(root)
        unused = [each for place in places for each in place.unused]
        rows, faults = _captions_of_tables(places)
        pictures = [each for place in places for each in _with_sidecars(place, rows, unused)]
    return Listing(pictures, unused + faults, [path.name for path in places[0].folders])


def _places(root: Path) -> list[_Place]:
    """The folders whose pictures are used: the first is the root."""
    first = _look(root, root)
    places = [first]
    named = _named_folders(first)
    for place in places:  # grows: a named folder may lie in a named folder
        for path in place.folders:
            repeated = _REPEATED.fullmatch(path.name)
            if path in named:
                places.append(_look(path, root))
            elif repeated and place is first and not first.pictures:
                _add_repeated(places, path, root, int(repeated[1]))
            else:
                place.unused.append((path, _why_not_entered(path, bool(repeated))))
    return places


def _add_repeated(places: list[_Place], path: Path, root: Path, repeats: int) -> None:
    if repeats > MOST_REPEATS:
        raise PhotoFolderError(
            f"{path} would show each picture {repeats:,} times an epoch, as kohya's tools read its "
            "name. Rename it if the number means something else, or pass it as the photo folder."
        )
    if repeats:
        place = _look(path, root)
        place.repeats = repeats
        places.append(place)
    else:
        places[0].unused.append((path, "a folder whose pictures are shown 0 times"))


def _why_not_entered(path: Path, repeated: bool) -> str:
    if repeated:
        return "a folder beside photos: its number counts where all photos lie in such folders"
    return "a folder, not looked into: pass it as the photo folder"


def _named_folders(place: _Place) -> set[Path]:
    """Folders in which a table's pictures lie, with those above them."""
    if place.table is None:
        return set()
    named = set()
    for row in read_table(place.table):
        for depth in range(1, len(row.parts)):
            named.add(place.path.joinpath(*row.parts[:depth]))
    return named


def _look(folder: Path, root: Path) -> _Place:
    """The entries of a folder, sorted by what they are."""
    place = _Place(folder)
    for path in sorted(folder.iterdir()):
        fault = _fault_of(path, root)
        if fault:
            place.unused.append((path, fault))
        elif path.is_dir():
            _add_folder(place, path, root)
        elif path.name == TABLE:
            place.table = path
        elif is_picture(path):
            place.pictures.append(path)
        elif is_mask(path):
            place.masks.append(path)
        elif is_caption(path):
            place.captions.append(path)
        else:
            place.unused.append((path, _foreign(path)))
    place.unused = [each for each in place.unused if not _is_clutter(each[0])]
    return place


def _add_folder(place: _Place, path: Path, root: Path) -> None:
    if path.name != MASK_FOLDER:
        place.folders.append(path)
        return
    for mask in sorted(path.iterdir()):
        fault = _fault_of(mask, root)
        if fault is None and (mask.is_dir() or mask.suffix.lower() not in SUFFIXES):
            fault = "not a mask"
        if fault:
            place.unused.append((mask, fault))
        else:
            place.masks.append(mask)


def _fault_of(path: Path, root: Path) -> str | None:
    """Why an entry is not even looked at, whatever its name says."""
    if path.name.startswith("."):
        return "hidden: its name begins with a dot"
    if path.is_symlink():
        if _leads_nowhere(path):
            return "a link that leads nowhere"
        if path.is_dir():
            return "a link to a folder, not followed"
        if not path.resolve().is_relative_to(root.resolve()):
            return "a link to outside the folder"
    return None if path.is_dir() or path.is_file() else "neither a file nor a folder"


def _leads_nowhere(link: Path) -> bool:
    """Whether a link's target is not there, or is the link itself."""
    try:
        link.stat()
    except OSError:
        return True
    return False


def _foreign(path: Path) -> str:
    if path.name == MASK_FOLDER:
        return f"a file, where a folder {MASK_FOLDER} would hold masks"
    if path.suffix.lower() in (".jsonl", ".json", ".csv", ".parquet"):
        return f"not read: captions come from {TABLE} alone"
    return "not a picture file"


def _is_clutter(path: Path) -> bool:
    """Whether the system left a file that looks like nothing of a photo folder."""
    if not path.name.startswith("."):
        return path.name in ("Thumbs.db", "desktop.ini")
    looks_like = is_picture(path) or is_mask(path) or is_caption(path) or path.suffix == ".jsonl"
    return not looks_like or path.is_dir()


def _captions_of_tables(
    places: Sequence[_Place],
) -> tuple[dict[Path, tuple[str, Path]], list[Unused]]:
    """Picture -> its caption and the table that it is from; and rows of no use."""
    pictures = {os.path.normpath(path): path for place in places for path in place.pictures}
    found: dict[Path, tuple[str, Path]] = {}
    faults: list[Unused] = []
    for place in reversed(places):  # a folder's own table counts more than the root's
        for row in read_table(place.table) if place.table else ():
            assert place.table is not None
            exact = place.path / row.name  # a backslash may be part of a name
            path = pictures.get(os.path.normpath(exact)) if row.parts else None
            path = path or pictures.get(os.path.normpath(place.path.joinpath(*row.parts)))
            fault = _fault_of_row(row.parts, path, row.text, found)
            if fault:
                named = place.path / row.name if row.parts else Path(row.name)
                faults.append((named, f"{fault}, line {row.number}"))
            elif path is not None:
                found[path] = (row.text, place.table)
    return found, faults


def _fault_of_row(
    parts: tuple[str, ...], path: Path | None, text: str, found: dict[Path, tuple[str, Path]]
) -> str | None:
    if not parts:
        return f"leads out of the folder in {TABLE}"
    if path is None:
        return f"not there, but named in {TABLE}"
    if not text:
        return f"named without a caption in {TABLE}"
    return f"has its caption from another line than that of {TABLE}" if path in found else None


def _with_sidecars(
    place: _Place, rows: dict[Path, tuple[str, Path]], unused: list[Unused]
) -> Iterator[Picture]:
    """The pictures of a folder; sidecars of no use are added to `unused`."""
    captions = caption_owners(place.captions, place.pictures)
    masks = mask_owners(place.masks, place.pictures)
    unused += captions.unused + masks.unused
    for path in place.pictures:
        text, source = rows.get(path, ("", None))
        file = captions.of.get(path)
        own = read_caption(file) if file else ""
        if file and not own:
            unused.append((file, "an empty caption"))
        elif file and text and own != text:
            unused.append((path, f"its caption in {TABLE} gives way to {file.name}"))
        if own:
            text, source = own, file
        yield Picture(path, place.repeats, text, source, masks.of.get(path))
