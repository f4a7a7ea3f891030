"""Values that commands and functions have to refuse, and the files that they name."""

from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

from random_adapters import mixed_adapter
from rite_diffusion.adapters import save_adapter

# What a parameter is, by its name. Names that are not here are what their type says.
FILES = {"file", "adapter", "adapters", "init", "model"}
FOLDERS = {"photos"}
OUTPUTS = {"out", "workspace"}
NAMED = {"base", "preset", "control", "controls", "region", "regions"}  # a path among other things
CHOICES = {"to", "method", "methods", "optimizer", "combine", "region_by", "columns", "dtype"}
GOOD = {
    "file": "a.safetensors",
    "adapter": "a.safetensors",
    "adapters": "a.safetensors",
    "photos": "photos",
    "trigger": "<thing>",
    "class_noun": "toy",
    "to": "kohya",
    "repository": "nobody/nothing",
}
NUMBERS = ["-1", "0", "9223372036854775808", "18446744073709551616", "-18446744073709551617"]
NO_NUMBERS = ["x", "", "nan", "1e999", "0x10", "\x1b[31m"]
TEXTS = ["", " ", "\0", "\udcff", "\x1b[31m", "x" * 5000, "../..", "-", "=", ":", "{", "%s", "{0}"]
CONTROLS = [
    "x=photos/0.png",
    "broken_base=photos/0.png:nan",
    "broken_base=garbage",
    "photos=missing",
]
# Paths that no command can read or write, in a folder that `world` makes.
NO_PATHS = ["missing", "a\0b", "x" * 300, "~nobody-here/x", "loop", "dangling", "photos/0.png/x"]
NO_FILES = ["empty", "garbage", "web.safetensors", "photos", "", ".", "/proc/self/mem", "new\nline"]
NO_FOLDERS = ["empty", "garbage", "hollow", "", "a.safetensors", "x.toml"]


def kind_of(name: str, annotation) -> str:
    """What sort of value a parameter takes."""
    name = name.strip("_")
    for kind, names in (("file", FILES), ("folder", FOLDERS), ("output", OUTPUTS)):
        if name in names:
            return kind
    if name in NAMED or name in CHOICES:
        return "named" if name in NAMED else "choice"
    text = str(annotation)
    if "bool" in text or "Callable" in text:
        return "flag"
    if "int" in text.replace("print", "") or "float" in text:
        return "number"
    return "path" if "Path" in text else "text"


def bad_values(kind: str) -> dict[str, bool]:
    """Values for a kind of parameter, and whether each is certain to be refused."""
    certain = {
        "file": NO_PATHS + NO_FILES,
        "folder": NO_PATHS + NO_FOLDERS,
        "path": NO_PATHS,
        "output": ["a\0b", "x" * 300, "~nobody-here/x", "photos/0.png/x", "/proc/nothing/x.png"],
        "named": ["missing", "a\0b", "x" * 300, "loop", "garbage", "broken_base"],
        "choice": ["nothing", "\x1b[31m", "KOHYA "],
        "number": NO_NUMBERS,
    }.get(kind, [])
    open_ = {
        "output": ["", ".", "photos", "empty", "loop", "dangling", "new.jpg", "new.safetensors"],
        "named": [*TEXTS, "empty", "photos", "x.toml", "a.safetensors", *CONTROLS],
        "choice": TEXTS,
        "number": NUMBERS,
        "text": [*TEXTS, "x" * 300],
    }.get(kind, [])
    return dict.fromkeys(open_, False) | dict.fromkeys(certain, True)


def make_world(folder: Path) -> None:
    """The files that bad and good values name."""
    (folder / "photos").mkdir(parents=True)
    for index, colour in enumerate(("red", "green", "blue")):
        Image.new("RGB", (80, 70), colour).save(folder / f"photos/{index}.png")
    (folder / "hollow").mkdir()
    (folder / "empty").touch()
    (folder / "garbage").write_bytes(bytes(range(256)) * 20)
    (folder / "web.safetensors").write_text("<html>404</html>")
    (folder / "loop").symlink_to("loop")
    (folder / "dangling").symlink_to("nowhere")
    (folder / "x.toml").write_text("steps = [")
    (folder / "broken_base").mkdir()
    (folder / "broken_base/model_index.json").write_text("[]")
    (folder / "broken_base/config.json").write_text("[]")
    torch.manual_seed(0)
    adapter = mixed_adapter()
    save_adapter(folder / "a.safetensors", replace(adapter, info=replace(adapter.info, base="")))
