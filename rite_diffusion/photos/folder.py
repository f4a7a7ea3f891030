"""A folder of photos as the trainer finds it: what is used, what is skipped and why.

Pictures lie in the folder itself, or in subfolders `10_name` as kohya's tools have them, whose
number says how often an epoch shows each. A caption is a `.txt` or `.caption` beside the picture,
or a line of `metadata.jsonl`. A mask is `name-masklabel.png`, `masks/name.png`, or the picture's
own transparency.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from rite_diffusion.photos.images import (
    SUFFIXES,
    UnreadableImage,
    open_image,
    open_mask,
    perceptual_hash,
    transparency_mask,
)
from rite_diffusion.types import Concept, Photo, PhotoFolderError

MASK_ENDING = "-masklabel"
COMPANIONS = {".txt", ".caption", ".jsonl"}  # files beside pictures that are no pictures
LEAST_SIDE = 16  # pixels
LONGEST_SHAPE = 6  # long side over short side
ALIKE = 5  # bits of 64 in which near-duplicates may differ
_REPEATED = re.compile(r"(\d{1,4})_.+")


@dataclass(frozen=True)
class PhotoFolder:
    """The usable photos of a folder, and the files that are none with the reason."""

    photos: list[Photo]
    skipped: list[tuple[Path, str]]
    captioned: int  # photos whose caption came from a file

    def sizes(self) -> str:
        """Range of the photos' sizes in words."""
        found = sorted({photo.image.size for photo in self.photos})
        names = [f"{width}x{height}" for width, height in found]
        return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"

    def near_duplicates(self) -> list[tuple[str, str]]:
        """Names of pictures that look alike."""
        hashes = [(photo.path.name, perceptual_hash(photo.image)) for photo in self.photos]
        pairs = combinations(hashes, 2)
        return [(a[0], b[0]) for a, b in pairs if (a[1] ^ b[1]).bit_count() <= ALIKE]

    def smaller_than(self, side: int) -> list[str]:
        """Names of pictures that have to be scaled up."""
        return [photo.path.name for photo in self.photos if min(photo.image.size) < side]


def joined(folders: Sequence[PhotoFolder]) -> PhotoFolder:
    """Several folders as one."""
    return PhotoFolder(
        [photo for folder in folders for photo in folder.photos],
        [each for folder in folders for each in folder.skipped],
        sum(folder.captioned for folder in folders),
    )


def caption_file(image: Path) -> Path | None:
    """The text file that captions a picture: same stem, `.txt` or `.caption`."""
    candidates = (image.with_suffix(suffix) for suffix in (".txt", ".caption"))
    return next((path for path in candidates if path.is_file()), None)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise PhotoFolderError(f"{path} is not UTF-8 text. Save it as UTF-8.") from None


def _listed_captions(folder: Path) -> dict[str, str]:
    """File name -> caption of `metadata.jsonl`, as datasets' image folders have it."""
    path = folder / "metadata.jsonl"
    captions = {}
    for number, line in enumerate(_read_text(path).splitlines() if path.is_file() else [], 1):
        try:
            row = json.loads(line) if line.strip() else {}
            name, text = row.get("file_name"), row.get("text", row.get("caption", ""))
        except (json.JSONDecodeError, AttributeError):
            raise PhotoFolderError(
                f'{path}, line {number}: expected {{"file_name": "a.jpg", "text": "…"}}'
            ) from None
        if name:
            captions[str(name)] = str(text)
    return captions


def _folders(folder: Path) -> list[tuple[Path, int]]:
    """The folder itself and its subfolders `10_name`, with how often each picture is shown."""
    below = sorted(path for path in folder.iterdir() if path.is_dir() and not path.is_symlink())
    repeated = [(path, int(m[1])) for path in below if (m := _REPEATED.fullmatch(path.name))]
    return [(folder, 1), *repeated]


def _mask_file(image: Path) -> Path | None:
    candidates = (
        image.with_name(f"{image.stem}{MASK_ENDING}.png"),
        image.parent / "masks" / f"{image.stem}.png",
    )
    return next((path for path in candidates if path.is_file()), None)


def _reason_against(path: Path, root: Path) -> str | None:
    """Why a file is not even opened."""
    if not path.resolve().is_relative_to(root.resolve()):
        return "a link to outside the folder"
    return None if path.suffix.lower() in SUFFIXES else "not a picture file"


def _open_photo(path: Path, caption: str, repeats: int) -> Photo:
    """The photo with its mask; UnreadableImage says why there is none."""
    image = open_image(path)
    short, long = sorted(image.size)
    if short < LEAST_SIDE or long > LONGEST_SHAPE * short:
        raise UnreadableImage(f"{image.width}x{image.height} is too small or too long a strip")
    mask_path = _mask_file(path)
    mask = open_mask(mask_path, image.size) if mask_path else transparency_mask(path)
    return Photo(path, image, caption, mask, repeats)


def read_folder(
    folder: Path, concept: Concept, templates: list[str], repeats: int = 1
) -> PhotoFolder:
    """The folder's photos in the order of their names, captioned, each `repeats` times an epoch.

    A photo without a caption of its own gets one of `templates` in turn; `{trigger}` and
    `{class_noun}` are filled in everywhere. Raises PhotoFolderError where no photo is usable, or
    more pictures are broken than whole.
    """
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise PhotoFolderError(f"{folder} {what}. Pass the folder that directly holds the photos.")
    photos, skipped, captioned = [], [], 0
    for place, own_repeats in _folders(folder):
        listed = _listed_captions(place)
        for path in _pictures(place):
            reason = _reason_against(path, folder)
            source = caption_file(path)
            text = " ".join((_read_text(source) if source else listed.get(path.name, "")).split())
            own = text or templates[len(photos) % len(templates)]
            own = own.replace("{trigger}", concept.trigger)
            own = own.replace("{class_noun}", concept.class_noun)
            try:
                if reason:
                    raise UnreadableImage(reason)
                photos.append(_open_photo(path, own, repeats * own_repeats))
            except UnreadableImage as fault:
                skipped.append((path, str(fault)))
            else:
                captioned += bool(text)
        missing = sorted(set(listed) - {path.name for path in _pictures(place)})
        skipped += [(place / name, "named in metadata.jsonl, but not there") for name in missing]
    broken = [path for path, _ in skipped if path.suffix.lower() in SUFFIXES and path.exists()]
    if not photos or len(broken) > len(photos):
        raise PhotoFolderError(_nothing_usable(folder, skipped))
    return PhotoFolder(photos, skipped, captioned)


def _pictures(folder: Path) -> list[Path]:
    """Files that should be pictures, in the order of their names."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return [
        path
        for path in files
        if path.suffix.lower() not in COMPANIONS
        and not path.name.startswith(".")
        and not path.stem.endswith(MASK_ENDING)
    ]


def _nothing_usable(folder: Path, skipped: list[tuple[Path, str]]) -> str:
    if skipped:
        reasons = "; ".join(f"{path.name}: {reason}" for path, reason in skipped[:5])
        return (
            f"no usable image in {folder}, or fewer than broken ones ({reasons}). Add whole .jpg, "
            ".png or .webp photos, or take the broken ones out."
        )
    below = [path.name for path in sorted(folder.iterdir()) if path.is_dir()]
    hint = f" It holds the folders {', '.join(below[:5])}: pass one of them." if below else ""
    return (
        f"no images in {folder}: expected .jpg, .png or .webp.{hint} "
        "Pass the folder that directly holds the photos."
    )
