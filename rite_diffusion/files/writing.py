"""Files that are whole or not there, and the place for those that can be made again."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any


def write_atomically(path: Path, content: bytes) -> None:
    """Write a temporary file beside `path`, flush it to the disk, and rename it into place."""
    # A digest stands for the name: with anything added, a long name would be too long.
    digest = sha256(os.fsencode(path.name)).hexdigest()[:16]
    temporary = path.with_name(f".{digest}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file that another process may be writing; empty where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def cache_folder() -> Path:
    """Where encoded photos and class pictures are kept: `RITE_CACHE`, or the user's cache."""
    chosen = os.environ.get("RITE_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rite_diffusion"


@contextmanager
def reading(path: Path, fault: type[Exception]) -> Iterator[None]:
    """Reading of files below a path; what the system refuses becomes one line of a `fault`."""
    try:
        yield
    except OSError as error:
        raise fault(
            f"cannot read {error.filename or path}: {error.strerror or error}. Check that it is "
            "there and that you may read it."
        ) from None
