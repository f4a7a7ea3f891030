"""Paths from users, atomic writing of files, checks of outputs, and the cache folder."""

import json
import mimetypes
import os
import sys
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rite_diffusion.errors import OutputError, PathError

# Suffixes that Python's own table of file types lacks.
_MODEL_SUFFIXES = {".safetensors", ".ckpt", ".pt", ".pth", ".onnx", ".gguf", ".toml", ".yaml"}


def user_path(path: str | Path) -> Path:
    """A user's path with `~` expanded; PathError for a path that no file can have."""
    try:
        expanded = Path(path).expanduser()
        with suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            expanded.lstat()  # ValueError for a NUL byte, OSError for a name that is too long
    except (RuntimeError, ValueError, OSError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise PathError(f"{str(path)!r} is not a path ({reason}): check its spelling.") from None
    # `.` and `..` are resolved, as names of other files are made from the path's name.
    return expanded if expanded.name not in ("", "..") else expanded.resolve()


def printable(text: str) -> str:
    """The text on one line, control codes escaped, so that it is safe to print."""
    if text.isprintable():
        return text
    shown = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return "".join(shown)


def print_to_stderr(line: str) -> None:
    """Print a line to standard error, control codes escaped."""
    print(printable(line), file=sys.stderr)


def file_output(path: str | Path, suffix: str) -> Path:
    """The path of a file to write; OutputError where its name does not end in `suffix`."""
    wanted = user_path(path)
    if wanted.suffix.lower() != suffix:
        raise OutputError(f"{wanted} is not a {suffix} file: name one as --out.")
    return wanted


def folder_output(path: str | Path) -> Path:
    """The path of a folder to write to, which need not exist.

    OutputError for a file, a name with a file's suffix, and a folder that cannot be written.
    """
    wanted = user_path(path)
    kind, _ = mimetypes.MimeTypes().guess_type(wanted.name)
    named_as_file = kind or wanted.suffix.lower() in _MODEL_SUFFIXES or os.path.lexists(wanted)
    if named_as_file and not wanted.is_dir():
        raise OutputError(f"{wanted} names a file, and a folder is needed: name one as --out.")
    try:
        _probe(wanted)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(f"cannot write to {wanted}: {reason}. Choose another --out.") from None
    return wanted


def check_outputs(
    named: Iterable[Path] = (),
    derived: Iterable[Path] = (),
    *,
    sources: Iterable[Path] = (),
    overwrite: bool = False,
) -> None:
    """Raise OutputError where these files cannot be written without loss; writes nothing.

    `named` are paths that the user gave; a file there may be replaced. `derived` are paths that
    follow from others; they must not exist, unless `overwrite`. All must differ from one another
    and from `sources`, the files and folders that the command reads.
    """
    asked, others, read = list(named), list(derived), list(sources)
    taken: dict[str, Path] = {}
    for path in (*asked, *others):
        try:
            real = path.resolve()
            _refuse_source(path, real, read)
            key = str(real).casefold()  # file systems that ignore case take two such for one
            if key in taken:
                both = f"{taken[key]} and {path}"
                raise OutputError(f"{both} would be one file: choose another --out.")
            taken[key] = path
            if path in others and not overwrite and os.path.lexists(path):
                raise OutputError(f"{path} exists already: move it away, or pass --overwrite.")
            if path.is_dir():
                raise OutputError(f"{path} is a folder: name a file as --out.")
            _probe(path.parent)
        except (OSError, RuntimeError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise OutputError(f"cannot write to {path}: {reason}. Choose another --out.") from None


def _refuse_source(path: Path, real: Path, sources: Iterable[Path]) -> None:
    for source in sources:
        inside = source.is_dir() and real.is_relative_to(source.resolve()) and real.exists()
        same = inside or (real.exists() and source.exists() and real.samefile(source))
        if same:
            raise OutputError(f"{path} is what is read: choose another --out.")


def _probe(folder: Path) -> None:
    """Raise OSError where a folder, which need not exist, cannot be written; changes nothing."""
    missing = _missing(folder)
    probe = folder / f".rite-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    finally:
        _remove_empty(missing)


def _missing(folder: Path) -> list[Path]:
    """The folder and its parents that do not exist, the deepest first."""
    return [each for each in (folder, *folder.parents) if not each.exists()]


def _remove_empty(folders: Iterable[Path]) -> None:
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


@contextmanager
def staging_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder inside `folder`, which is made if needed, for files to be moved out of it.

    It is removed at the end; if the block fails, so are folders that were made.
    """
    missing = _missing(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".rite-", dir=folder) as place:
            yield Path(place)
    except BaseException:
        _remove_empty(missing)
        raise


def write_output(path: Path, content: bytes) -> None:
    """Write a file with `write_atomically`; its folder is made if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a temporary file beside `path`, flush it to the disk, and rename it into place."""
    # A short name, as the name of `path` may have the greatest length that is allowed.
    short = f"{zlib.crc32(os.fsencode(path.name)):08x}"
    temporary = path.with_name(f".{os.getpid()}-{short}.tmp")
    try:
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where the file is missing or not an object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def cache_folder() -> Path:
    """The folder for encoded photos and class pictures: `RITE_CACHE`, or in the user's cache."""
    chosen = os.environ.get("RITE_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rite_diffusion"


@contextmanager
def reading(path: Path, fault: type[Exception]) -> Iterator[None]:
    """Turns an OSError in the block, which reads a path, into a `fault` with a one-line message."""
    try:
        yield
    except OSError as error:
        raise fault(
            f"cannot read {error.filename or path}: {error.strerror or error}. Check that it is "
            "there and that you may read it."
        ) from None
