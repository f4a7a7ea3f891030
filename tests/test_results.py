"""Committed results name nothing that only the machine has on which they were made."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.machine import ROOT, readable_command
from rite_diffusion.adapters.storage import read_header

# An absolute path of two parts or more, a home folder, or a Windows drive.
MACHINES_PATH = re.compile(r"""(?:^|[\s"'=:(,\[])(/[\w.-]+(?:/[\w.-]+)+|~/|[A-Za-z]:\\)""")
FOLDERS = ("benchmarks", "docs", "train", "rite_diffusion", "examples", "configs")
SUFFIXES = {".json", ".jsonl", ".ipynb", ".png", ".safetensors", ".csv"}
FILES = sorted(
    path
    for folder in FOLDERS
    for path in (ROOT / folder).rglob("*")
    if path.suffix in SUFFIXES and "_build" not in path.parts
)


def strings_of(value) -> list[str]:
    """Every string of a JSON value, keys too."""
    if isinstance(value, dict):
        return [*value, *(text for each in value.values() for text in strings_of(each))]
    if isinstance(value, list):
        return [text for each in value for text in strings_of(each)]
    return [value] if isinstance(value, str) else []


def texts_of(path: Path) -> list[str]:
    """What a file says: its strings, or the notes inside a picture or a model."""
    if path.suffix == ".png":
        with Image.open(path) as image:
            return strings_of(dict(image.info))
    if path.suffix == ".safetensors":
        return strings_of(read_header(path))
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".csv":
        return text.splitlines()
    lines = text.splitlines() if path.suffix == ".jsonl" else [text]
    return [each for line in lines for each in strings_of(json.loads(line))]


def test_benchmark_results_are_committed():
    assert sum(path.is_relative_to(ROOT / "benchmarks" / "results") for path in FILES) > 10


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_committed_file_holds_no_path_of_a_machine(path):
    if path.name == "tokenizer.json" or "clip_tokenizer" in path.parts:
        return  # a vocabulary has every word
    assert [text[:200] for text in texts_of(path) if MACHINES_PATH.search(text)] == []


@pytest.mark.parametrize(
    "text",
    ["python x.py --peer /srv/a/b.py", "--out=/tmp/x/y", "/home/me/x", "~/x", "C:\\x", '"/a/b"'],
)
def test_paths_of_a_machine_are_recognised(text):
    assert MACHINES_PATH.search(text)


@pytest.mark.parametrize("text", ["https://a.b/c/d", "images/s", "a/b/c.py", "1/2", "and/or", "/"])
def test_slashes_that_are_no_paths_are_not_reported(text):
    assert not MACHINES_PATH.search(text)


def test_a_command_is_written_as_a_reader_types_it(monkeypatch):
    monkeypatch.chdir(ROOT / "benchmarks")
    inside, outside = str(ROOT / "configs" / "sd15.toml"), "/some/where/peer.py"
    command = readable_command(
        ["speed.py", "--peer", outside, f"--preset={inside}", "--base", "~/models/sd15", "a b"]
    )
    assert command == (
        "python benchmarks/speed.py --peer peer.py --preset=configs/sd15.toml --base sd15 'a b'"
    )
