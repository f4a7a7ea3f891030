"""Listing of a photo folder: pictures with their sidecars, and the files that are not used.

Pictures are in the folder itself; or all in subfolders `10_name`, as of kohya's tools, whose number
is the repeats per epoch; or in subfolders that `metadata.jsonl` names.
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
    is_caption,
    is_mask,
    is_picture,
    match_captions,
    match_masks,
)

MAX_REPEATS = 1000
_REPEATED = re.compile(r"(\d+)_.+", re.ASCII)


@dataclass(frozen=True)
class Picture:
    """A file with a picture's suffix, with its sidecars; it has not been opened yet."""

    path: Path
    repeats: int = 1
    caption: str = ""  # of its sidecar or row; empty if there is none
    caption_from: Path | None = None
    mask: Path | None = None


@dataclass(frozen=True)
class Listing:
    """The pictures of a folder in the order of their names, and the files that are not used."""

    pictures: list[Picture]
    unused: list[Unused]
    folders: list[str]  # names of subfolders, for messages


@dataclass
class _FolderFiles:
    """The files of one folder by kind."""

    path: Path
    repeats: int = 1
    pictures: list[Path] = field(default_factory=list)
    captions: list[Path] = field(default_factory=list)
    masks: list[Path] = field(default_factory=list)
    table: Path | None = None
    folders: list[Path] = field(default_factory=list)
    unused: list[Unused] = field(default_factory=list)


def list_pictures(root: Path) -> Listing:
    """The content of a photo folder; only captions are read.

    Raises PhotoFolderError where the folder or a caption cannot be read, a caption file is not
    UTF-8, or a folder's name asks for more than 1,000 repeats.
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


def _places(root: Path) -> list[_FolderFiles]:
    """The folders whose pictures are used, first the root."""
    first = _list_folder(root, root)
    places = [first]
    named = _named_folders(first)
    for place in places:  # grows, as named folders may be nested
        for path in place.folders:
            repeated = _REPEATED.fullmatch(path.name)
            if path in named:
                places.append(_list_folder(path, root))
            elif repeated and place is first and not first.pictures:
                _add_repeated(places, path, root, int(repeated[1]))
            else:
                place.unused.append((path, _why_not_entered(path, bool(repeated))))
    return places


def _add_repeated(places: list[_FolderFiles], path: Path, root: Path, repeats: int) -> None:
    if repeats > MAX_REPEATS:
        raise PhotoFolderError(
            f"{path} would show each picture {repeats:,} times an epoch, as kohya's tools read its "
            "name. Rename it if the number means something else, or pass it as the photo folder."
        )
    if repeats:
        place = _list_folder(path, root)
        place.repeats = repeats
        places.append(place)
    else:
        places[0].unused.append((path, "a folder whose pictures are shown 0 times"))


def _why_not_entered(path: Path, repeated: bool) -> str:
    if repeated:
        return "a folder beside photos: its number counts where all photos lie in such folders"
    return "a folder, not looked into: pass it as the photo folder"


def _named_folders(place: _FolderFiles) -> set[Path]:
    """The folders that hold a table's pictures, with their parents."""
    if place.table is None:
        return set()
    named = set()
    for row in read_table(place.table):
        for depth in range(1, len(row.parts)):
            named.add(place.path.joinpath(*row.parts[:depth]))
    return named


def _list_folder(folder: Path, root: Path) -> _FolderFiles:
    """The entries of a folder by kind."""
    place = _FolderFiles(folder)
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


def _add_folder(place: _FolderFiles, path: Path, root: Path) -> None:
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
    """The reason to skip an entry of any kind, None where there is none."""
    if path.name.startswith("."):
        return "hidden: its name begins with a dot"
    if path.is_symlink():
        if _is_broken_link(path):
            return "a link that leads nowhere"
        if path.is_dir():
            return "a link to a folder, not followed"
        if not path.resolve().is_relative_to(root.resolve()):
            return "a link to outside the folder"
    return None if path.is_dir() or path.is_file() else "neither a file nor a folder"


def _is_broken_link(link: Path) -> bool:
    """Whether a link's target is missing, or is the link itself."""
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
    """Whether a file is one that systems create, such as Thumbs.db, and not worth a report."""
    if not path.name.startswith("."):
        return path.name in ("Thumbs.db", "desktop.ini")
    looks_like = is_picture(path) or is_mask(path) or is_caption(path) or path.suffix == ".jsonl"
    return not looks_like or path.is_dir()


def _captions_of_tables(
    places: Sequence[_FolderFiles],
) -> tuple[dict[Path, tuple[str, Path]], list[Unused]]:
    """Picture -> its caption and the table that has it; and the rows that cannot be used."""
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
    place: _FolderFiles, rows: dict[Path, tuple[str, Path]], unused: list[Unused]
) -> Iterator[Picture]:
    """The pictures of a folder with sidecars; those that are not used are added to `unused`."""
    captions = match_captions(place.captions, place.pictures)
    masks = match_masks(place.masks, place.pictures)
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
