"""Uploaded photos, captions and zip archives; their number and size are checked first."""

import lzma
import shutil
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from rite_diffusion.errors import StudioError
from rite_diffusion.photos.images import SUFFIXES
from rite_diffusion.studio.workspace import name_from

MAX_FILES = 500  # photos and captions of one set
MAX_ENTRIES = 10_000  # of an archive, of any kind
LARGEST_FILE = 64_000_000  # bytes
LARGEST_SET = 1_000_000_000  # bytes
CAPTIONS = {".txt", ".caption"}
_CHUNK = 1 << 20
# What zipfile raises for an archive that cannot be read, by its version or its compression.
_UNREADABLE = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, RuntimeError,
    UnicodeError, ValueError,
)  # fmt: skip


def save_photos(uploads: Sequence[str], folder: Path) -> list[str]:
    """Copy photos and captions, also those in zip archives, into a folder.

    Names are made safe and unique. Returns a line for each picture that cannot be read, which is
    left out. StudioError, with nothing written, for too many or too large files, for damaged or
    harmful archives, and where a new folder would have no photo.
    """
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    kept: list[Path] = []
    try:
        for source, name in _files(uploads):
            kept.append(_keep(source, name, folder))
            if len(kept) > MAX_FILES:
                raise StudioError(f"more than {MAX_FILES} files: choose fewer photos.")
            if sum(path.stat().st_size for path in kept) > LARGEST_SET:
                raise StudioError(f"the photos are over {LARGEST_SET // 10**9} GB: choose fewer.")
        return _without_unreadable(kept, made)
    except (StudioError, OSError, *_UNREADABLE) as error:
        for path in kept:
            path.unlink(missing_ok=True)
        if made:
            folder.rmdir()
        if isinstance(error, _UNREADABLE):
            raise StudioError(
                "the zip archive is damaged, or compressed in a way that is not read here: make "
                "it again, or drop the photos themselves."
            ) from None
        raise


def _without_unreadable(kept: list[Path], new: bool) -> list[str]:
    """Delete the pictures that a training could not read, and return a line for each.

    StudioError where nothing is left, or only captions are for a `new` set.
    """
    from rite_diffusion.photos.images import UnreadableImage, open_image

    faults = []
    for path in [path for path in kept if path.suffix not in CAPTIONS]:
        try:
            open_image(path)
        except UnreadableImage as fault:
            faults.append(f"{path.name}: {fault}")
            path.unlink()
            kept.remove(path)
    if not kept or (new and all(path.suffix in CAPTIONS for path in kept)):
        why = f" {'; '.join(faults[:3])}." if faults else ""
        raise StudioError(f"no photos among the files: expected .jpg, .png, .webp or a .zip.{why}")
    return faults


def _files(uploads: Sequence[str]) -> Iterator[tuple[Path | tuple[zipfile.ZipFile, str], str]]:
    """Photos and captions: a path, or an archive and an entry, and the file's name."""
    for upload in map(Path, uploads):
        suffix = upload.suffix.lower()
        if suffix == ".zip":
            with zipfile.ZipFile(upload) as archive:
                for entry in _entries(archive):
                    yield (archive, entry), PurePosixPath(entry).name
        elif suffix in SUFFIXES | CAPTIONS:
            yield upload, upload.name


def _entries(archive: zipfile.ZipFile) -> list[str]:
    """Names of an archive's photos and captions; StudioError for a harmful archive."""
    if len(archive.infolist()) > MAX_ENTRIES:
        raise StudioError(f"the zip archive holds over {MAX_ENTRIES} files: choose fewer photos.")
    names = []
    for entry in archive.infolist():
        path = PurePosixPath(entry.filename.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts or ":" in entry.filename:
            raise StudioError(f"the zip archive holds a path that leads out of it: {path}.")
        if (entry.external_attr >> 16) & 0o170000 == 0o120000:
            raise StudioError(f"the zip archive holds a link: {path}.")
        hidden = path.name.startswith(".") or "__MACOSX" in path.parts
        if entry.is_dir() or hidden or path.suffix.lower() not in SUFFIXES | CAPTIONS:
            continue
        if entry.flag_bits & 1:
            raise StudioError("the zip archive has a password: make one without.")
        if entry.file_size > LARGEST_FILE:
            raise StudioError(f"{path} is over {LARGEST_FILE // 10**6} MB: make it smaller.")
        names.append(entry.filename)
    return names


def _keep(source: Path | tuple[zipfile.ZipFile, str], name: str, folder: Path) -> Path:
    """Copy one file under a safe name and return its path; captions keep their picture's stem."""
    original = PurePosixPath(name)
    stem, suffix = name_from(original.stem, "photo"), original.suffix.lower()
    target = _free(folder, stem, suffix)
    if isinstance(source, Path):
        if source.stat().st_size > LARGEST_FILE:
            raise StudioError(f"{name} is over {LARGEST_FILE // 10**6} MB: make it smaller.")
        shutil.copyfile(source, target)
        return target
    try:
        _unpack(*source, target)
    except (StudioError, OSError, *_UNREADABLE):
        target.unlink(missing_ok=True)
        raise
    return target


def _unpack(archive: zipfile.ZipFile, entry: str, target: Path) -> None:
    """Write an archive's entry; StudioError above LARGEST_FILE bytes, whatever size it states."""
    left = LARGEST_FILE
    with archive.open(entry) as stream, target.open("wb") as out:
        while chunk := stream.read(_CHUNK):
            left -= len(chunk)
            if left < 0:
                size = LARGEST_FILE // 10**6
                raise StudioError(f"{target.name} is over {size} MB: make it smaller.")
            out.write(chunk)


def _free(folder: Path, stem: str, suffix: str) -> Path:
    paths = (folder / f"{stem}{suffix}", *(folder / f"{stem}-{i}{suffix}" for i in range(2, 9999)))
    return next(path for path in paths if not path.exists())
