"""A folder of photos as the trainer finds it: what is used, what is skipped and why."""

from dataclasses import dataclass
from pathlib import Path

from rite_diffusion.photos.images import SUFFIXES, UnreadableImage, open_image
from rite_diffusion.types import Concept, Photo, PhotoFolderError


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


def caption_file(image: Path) -> Path | None:
    """The text file that captions a picture: same stem, `.txt` or `.caption`."""
    candidates = (image.with_suffix(suffix) for suffix in (".txt", ".caption"))
    return next((path for path in candidates if path.is_file()), None)


def _read_caption(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise PhotoFolderError(f"{path} is not UTF-8 text. Save it as UTF-8.") from None
    return " ".join(text.split())


def read_folder(folder: Path, concept: Concept, templates: list[str]) -> PhotoFolder:
    """The folder's photos in the order of their names, captioned.

    A photo's caption is its caption file's text or else one of `templates` in turn; `{trigger}`
    and `{class_noun}` in either are filled in. Raises PhotoFolderError where no photo is usable.
    """
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise PhotoFolderError(f"{folder} {what}. Pass the folder that directly holds the photos.")
    files = sorted(path for path in folder.iterdir() if path.is_file())
    photos, skipped, captioned = [], [], 0
    for path in files:
        if path.suffix.lower() not in SUFFIXES:
            if path.suffix.lower() not in (".txt", ".caption") and not path.name.startswith("."):
                skipped.append((path, "not a picture file"))
            continue
        try:
            image = open_image(path)
        except UnreadableImage as reason:
            skipped.append((path, str(reason)))
            continue
        source = caption_file(path)
        text = _read_caption(source) if source else ""
        captioned += bool(text)
        text = text or templates[len(photos) % len(templates)]
        text = text.replace("{trigger}", concept.trigger).replace(
            "{class_noun}", concept.class_noun
        )
        photos.append(Photo(path, image, text))
    if not photos:
        raise PhotoFolderError(_nothing_usable(folder, skipped))
    return PhotoFolder(photos, skipped, captioned)


def _nothing_usable(folder: Path, skipped: list[tuple[Path, str]]) -> str:
    if skipped:
        reasons = "; ".join(f"{path.name}: {reason}" for path, reason in skipped[:5])
        return f"no usable image in {folder} ({reasons}). Add some .jpg, .png or .webp photos."
    below = [path.name for path in sorted(folder.iterdir()) if path.is_dir()]
    hint = f" It holds the folders {', '.join(below[:5])}: pass one of them." if below else ""
    return (
        f"no images in {folder}: expected .jpg, .png or .webp.{hint} "
        "Pass the folder that directly holds the photos."
    )
