"""Photo folders: the usable photos, and the files that are skipped, with reasons."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path

from PIL import Image

from rite_diffusion.config import PhotoSource, fill, unknown_placeholder, words_of
from rite_diffusion.errors import PhotoFolderError
from rite_diffusion.files.writing import reading, user_path
from rite_diffusion.photos.images import open_upright
from rite_diffusion.photos.listing import Picture, list_pictures
from rite_diffusion.photos.masks import mask_of, white_share
from rite_diffusion.photos.measures import measure
from rite_diffusion.photos.pixels import UnreadableImage
from rite_diffusion.photos.sidecars import Unused
from rite_diffusion.types import Concept, Photo

MIN_SIDE = 16  # pixels
MAX_RATIO = 6  # long side over short side


@dataclass(frozen=True)
class PhotoFolder:
    """The usable photos of a folder, and the skipped files with reasons."""

    photos: list[Photo]
    skipped: list[Unused]

    @property
    def captioned(self) -> int:
        """The number of photos whose caption came from a file."""
        return sum(photo.captioned for photo in self.photos)

    def sizes(self) -> str:
        """The range of the photos' sizes as text: "64x64 to 512x768"."""
        found = sorted({photo.size for photo in self.photos})
        names = [f"{width}x{height}" for width, height in found]
        return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"

    def smaller_than(self, side: int) -> list[str]:
        """Names of photos with a side below `side` pixels, which must be scaled up."""
        return [photo.path.name for photo in self.photos if min(photo.size) < side]

    def repeats(self) -> list[tuple[str, int, int]]:
        """(folder, number of photos, repeats) for each folder with repeated photos."""
        counts: dict[tuple[Path, int], int] = {}
        for photo in self.photos:
            key = (photo.path.parent, photo.repeats)
            counts[key] = counts.get(key, 0) + 1
        return [(path.name, count, often) for (path, often), count in counts.items() if often > 1]


def joined(folders: Sequence[PhotoFolder]) -> PhotoFolder:
    """Several folders joined into one."""
    return PhotoFolder(
        [photo for folder in folders for photo in folder.photos],
        [each for folder in folders for each in folder.skipped],
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
    """The folder's photos with captions, in the order of their names.

    A photo without a caption file gets one of `templates` in turn; `words` are the values of
    placeholders. Each picture is opened and checked, but its pixels are not kept. Raises
    PhotoFolderError where a sidecar cannot be used, where no photo is usable, and where more
    pictures are damaged than usable.
    """
    listing = list_pictures(folder)
    photos, broken = list[Photo](), list[Unused]()
    for picture in listing.pictures:
        caption = _caption(picture, words, templates[len(photos) % len(templates)])
        try:
            photo = _inspect_photo(picture, caption)
        except UnreadableImage as fault:
            broken.append((picture.path, str(fault)))
        else:
            often, captioned = repeats * picture.repeats, bool(picture.caption)
            photos.append(replace(photo, repeats=often, captioned=captioned))
    skipped = broken + listing.unused
    if not photos or len(broken) > len(photos):
        raise PhotoFolderError(_nothing_usable(folder, skipped, listing.folders))
    return PhotoFolder(photos, skipped)


def _caption(picture: Picture, words: Mapping[str, str], template: str) -> str:
    fault = unknown_placeholder(picture.caption, words)
    if fault:
        raise PhotoFolderError(f"{picture.caption_from}: {fault}")
    return fill(picture.caption or template, words)


def _inspect_photo(picture: Picture, caption: str) -> Photo:
    """The photo without its pixels; UnreadableImage where it cannot be used."""
    path, stamps = picture.path, _file_stamps(picture)
    upright = open_upright(path)
    short, long = sorted(upright.image.size)
    if short < MIN_SIDE or long > MAX_RATIO * short:
        width, height = upright.image.size
        raise UnreadableImage(f"{width}x{height} is too small or too long a strip")
    mask = mask_of(upright, picture.mask)
    return Photo(
        path,
        upright.image.size,
        caption,
        partial(_open_again, picture, stamps),
        _digest(upright.image),
        measure(upright.image),
        "" if mask is None else _digest(mask),
        None if mask is None else white_share(mask),
    )


def _digest(image: Image.Image) -> str:
    digest = sha256(f"{image.size}".encode())
    digest.update(image.tobytes())
    return digest.hexdigest()[:16]


def _file_stamps(picture: Picture) -> list[tuple[int, int]]:
    """(modification time, size) of the files of a picture and its mask."""
    with reading(picture.path, PhotoFolderError):
        stats = [path.stat() for path in (picture.path, picture.mask) if path is not None]
    return [(stat.st_mtime_ns, stat.st_size) for stat in stats]


def _open_again(
    picture: Picture, stamps: list[tuple[int, int]]
) -> tuple[Image.Image, Image.Image | None]:
    """Pixels and mask of a photo; PhotoFolderError if its files have changed since the check."""
    if _file_stamps(picture) != stamps:
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
