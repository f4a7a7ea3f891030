"""Reading of captions: text files, and rows of `metadata.jsonl`."""

import json
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from rite_diffusion.errors import PhotoFolderError
from rite_diffusion.files.writing import reading

TABLE = "metadata.jsonl"
TEXTS = ("text", "caption", "prompt")  # keys of a row's caption, in order of preference
_SURROGATE = re.compile("[\ud800-\udfff]")  # half a character, which JSON can escape
FORM = '{"file_name": "a.jpg", "text": "…"}'


@dataclass(frozen=True)
class Row:
    """A line of `metadata.jsonl`."""

    number: int
    name: str  # of the picture, as written
    parts: tuple[str, ...]  # of its path within the table's folder; () where it leads out of it
    text: str  # empty where the row has no caption


def read_caption(path: Path) -> str:
    """A caption file's text as one line; PhotoFolderError where it cannot be read as UTF-8."""
    return " ".join(_read_text(path).split())


def read_table(path: Path) -> list[Row]:
    """The rows of a `metadata.jsonl`; PhotoFolderError names the first invalid line."""
    # Only \n ends a line: U+2028 and the like may be inside a JSON string.
    lines = enumerate(_read_text(path).split("\n"), 1)
    return [_row(path, number, line) for number, line in lines if line.strip()]


def _row(path: Path, number: int, line: str) -> Row:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError):
        row = None
    if not isinstance(row, dict) or not isinstance(name := row.get("file_name"), str) or not name:
        raise PhotoFolderError(f"{path}, line {number}: expected {FORM}")
    return Row(number, name, _parts(name), _text(path, number, row))


def _text(path: Path, number: int, row: dict[str, Any]) -> str:
    """The row's caption as one line, empty where it is null or missing."""
    text = next((row[key] for key in TEXTS if row.get(key) is not None), "")
    if not isinstance(text, str) or _SURROGATE.search(text):
        raise PhotoFolderError(
            f"{path}, line {number}: the caption is {json.dumps(text)[:80]}, expected a text as in "
            f"{FORM}"
        )
    return " ".join(text.split())


def _parts(name: str) -> tuple[str, ...]:
    """The parts of a relative POSIX or Windows path; () where it leads out of the folder."""
    path = PurePosixPath(name.replace("\\", "/"))
    drive = len(path.parts) > 0 and path.parts[0].endswith(":")
    return () if path.is_absolute() or drive or ".." in path.parts else path.parts


def _read_text(path: Path) -> str:
    try:
        with reading(path, PhotoFolderError):
            return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise PhotoFolderError(f"{path} is not UTF-8 text. Save it as UTF-8.") from None
