"""A folder of photos as the trainer finds it: what is used, what is not and why."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from itertools import combinations
from pathlib import Path

from PIL import Image

from rite_diffusion.config import PhotoSource, fill, unknown_placeholder, words_of
from rite_diffusion.errors import PhotoFolderError
from rite_diffusion.files.writing import reading, user_path
from rite_diffusion.photos.images import open_upright, perceptual_hash
from rite_diffusion.photos.listing import Picture, list_pictures
from rite_diffusion.photos.masks import mask_of, white_share
from rite_diffusion.photos.pixels import UnreadableImage
from rite_diffusion.photos.sidecars import Unused
from rite_diffusion.types import Concept, Photo

LEAST_SIDE = 16  # pixels
LONGEST_SHAPE = 6  # long side over short side
ALIKE = 5  # bits of 64 in which near-duplicates may differ


@dataclass(frozen=True)
class PhotoFolder:
    """The usable photos of a folder, and the files that are not used with the reason."""

    photos: list[Photo]
    skipped: list[Unused]
    captioned: int  # photos whose caption came from a file

    def sizes(self) -> str:
        """Range of the photos' sizes in words."""
        found = sorted({photo.size for photo in self.photos})
        names = [f"{width}x{height}" for width, height in found]
        return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"

    def near_duplicates(self) -> list[tuple[str, str]]:
        """Names of pictures that look alike."""
        pairs = combinations(self.photos, 2)
        return [
            (a.path.name, b.path.name)
            for a, b in pairs
            if (a.likeness ^ b.likeness).bit_count() <= ALIKE
        ]

    def smaller_than(self, side: int) -> list[str]:
        """Names of pictures that have to be scaled up."""
        return [photo.path.name for photo in self.photos if min(photo.size) < side]

    def repeats(self) -> list[tuple[str, int, int]]:
        """Name of each folder whose photos are shown several times, their number, how often."""
        counts: dict[tuple[Path, int], int] = {}
        for photo in self.photos:
            key = (photo.path.parent, photo.repeats)
            counts[key] = counts.get(key, 0) + 1
        return [(path.name, count, often) for (path, often), count in counts.items() if often > 1]


def joined(folders: Sequence[PhotoFolder]) -> PhotoFolder:
    """Several folders as one."""
    return PhotoFolder(
        [photo for folder in folders for photo in folder.photos],
        [each for folder in folders for each in folder.skipped],
        sum(folder.captioned for folder in folders),
    )


def read_source(source: PhotoSource) -> PhotoFolder:
    """The photos of one folder of a training; see `read_photos`."""
    return read_folder(user_path(source.photos), source.concept, source.templates, source.repeats)


def read_folder(
    folder: Path, concept: Concept, templates: Sequence[str], repeats: int = 1
) -> PhotoFolder:
    """A concept's photos, each shown `repeats` times an epoch; see `read_photos`."""
    return read_photos(folder, words_of(concept), templates, repeats)


def read_photos(
    folder: Path, words: Mapping[str, str], templates: Sequence[str], repeats: int = 1
) -> PhotoFolder:
    """The folder's photos in the order of their names, captioned.

    A photo without a caption of its own gets one of `templates` in turn; placeholders stand for
    `words` everywhere. Each picture is opened, looked at and let go. Raises PhotoFolderError where
    a sidecar cannot be used, no photo is usable, or more pictures are broken than whole.
    """
    listing = list_pictures(folder)
    photos, broken = list[Photo](), list[Unused]()
    captioned = 0
    for picture in listing.pictures:
        caption = _caption(picture, words, templates[len(photos) % len(templates)])
        try:
            photo = _look_at(picture, caption)
        except UnreadableImage as fault:
            broken.append((picture.path, str(fault)))
        else:
            photos.append(replace(photo, repeats=repeats * picture.repeats))
            captioned += bool(picture.caption)
    skipped = broken + listing.unused
    if not photos or len(broken) > len(photos):
        raise PhotoFolderError(_nothing_usable(folder, skipped, listing.folders))
    return PhotoFolder(photos, skipped, captioned)


def _caption(picture: Picture, words: Mapping[str, str], template: str) -> str:
    fault = unknown_placeholder(picture.caption, words)
    if fault:
        raise PhotoFolderError(f"{picture.caption_from}: {fault}")
    return fill(picture.caption or template, words)


def _look_at(picture: Picture, caption: str) -> Photo:
    """The photo without its pixels; UnreadableImage says why there is none."""
    path, stamps = picture.path, _stamps(picture)
    upright = open_upright(path)
    short, long = sorted(upright.image.size)
    if short < LEAST_SIDE or long > LONGEST_SHAPE * short:
        width, height = upright.image.size
        raise UnreadableImage(f"{width}x{height} is too small or too long a strip")
    mask = mask_of(upright, picture.mask)
    return Photo(
        path,
        upright.image.size,
        caption,
        partial(_open_again, picture, stamps),
        _digest(upright.image),
        perceptual_hash(upright.image),
        "" if mask is None else _digest(mask),
        None if mask is None else white_share(mask),
    )


def _digest(image: Image.Image) -> str:
    digest = sha256(f"{image.size}".encode())
    digest.update(image.tobytes())
    return digest.hexdigest()[:16]


def _stamps(picture: Picture) -> list[tuple[int, int]]:
    """Time of change and size of a picture's and its mask's file."""
    with reading(picture.path, PhotoFolderError):
        stats = [path.stat() for path in (picture.path, picture.mask) if path is not None]
    return [(stat.st_mtime_ns, stat.st_size) for stat in stats]


def _open_again(
    picture: Picture, stamps: list[tuple[int, int]]
) -> tuple[Image.Image, Image.Image | None]:
    """Pixels and mask of a photo that was looked at before; PhotoFolderError if it has changed."""
    if _stamps(picture) != stamps:
        raise PhotoFolderError(f"{picture.path} or its mask has just changed: start again.")
    try:
        upright = open_upright(picture.path)
    except UnreadableImage as fault:
        raise PhotoFolderError(f"{picture.path}: {fault}. Start again.") from None
    return upright.image, mask_of(upright, picture.mask)


def _nothing_usable(folder: Path, skipped: list[Unused], below: list[str]) -> str:
    if any(path.is_file() for path, _ in skipped):
        reasons = "; ".join(f"{path.name}: {reason}" for path, reason in skipped[:5])
        return (
            f"no usable image in {folder}, or fewer than broken ones ({reasons}). Add whole .jpg, "
            ".png or .webp photos, or take the broken ones out."
        )
    hint = f" It holds the folders {', '.join(below[:5])}: pass one of them." if below else ""
    return (
        f"no images in {folder}: expected .jpg, .png or .webp.{hint} "
        "Pass the folder that directly holds the photos."
    )
