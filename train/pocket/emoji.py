"""Emoji of four openly licensed sets as RGBA sprites of one size (sources in NOTICE).

`fetch` gets the sets with `npm pack` and draws every sprite once into a file that all processes
map into memory.
"""

import io
import json
import os
import subprocess
import tarfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 128  # pixels of a sprite's longer side
FOLDER = Path(os.environ.get("POCKET_EMOJI", Path(__file__).parents[1] / "emoji/sets"))

PACKAGES = {
    "flat": "@iconify-json/noto@1.2.9",
    "3d": "@lobehub/fluent-emoji-3d@1.1.0",
    "fluent": "@iconify-json/fluent-emoji-flat@1.2.6",
    "twemoji": "@iconify-json/twemoji@1.2.5",
}
SETS = tuple(PACKAGES)
SKIN_TONES = ("1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff")

# Emoji that nothing of a base has seen, in any set: first those of the examples and benchmarks,
# then those that measure how the autoencoder does on what it has never seen.
CONCEPTS = ("unicorn", "cupcake", "tractor", "parrot", "panda", "teapot", "dragon-face")
UNSEEN = (
    "sloth flamingo hedgehog peacock snail lobster avocado pretzel croissant sushi lollipop "
    "helicopter ferris-wheel violin telescope microscope backpack teddy-bear gem-stone "
    "nesting-dolls kiwi-fruit roller-skate peach jack-o-lantern hot-dog zebra"
).split()
HELD_OUT = (*CONCEPTS, *UNSEEN)


@dataclass(frozen=True)
class Sprites:
    """Every emoji as a sprite: arrays (N, SIDE, SIDE, 4) and, for each, what it shows."""

    pixels: np.ndarray
    keys: dict[tuple[str, str], tuple[int, int, int]]  # (set, name) -> index, width, height

    def image(self, style: str, name: str) -> Image.Image:
        """RGBA sprite cropped to what is visible; its longer side is SIDE."""
        index, width, height = self.keys[style, name]
        return Image.fromarray(self.pixels[index, :height, :width])

    def find(self, style: str, name: str) -> Image.Image | None:
        """The sprite, or None where the set lacks that emoji."""
        return self.image(style, name) if (style, name) in self.keys else None


def fetch(folder: Path = FOLDER) -> None:
    """Download and unpack the sets and draw the sprites, unless they are there."""
    for name, package in PACKAGES.items():
        target = folder / name
        if target.is_dir():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        command = ["npm", "pack", "--silent", package]
        packed = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
        with tarfile.open(folder / packed.stdout.strip().splitlines()[-1]) as archive:
            archive.extractall(target, filter="data")
    if not (folder / "sprites.npy").exists():
        _draw_all(folder)


def _names(folder: Path) -> dict[str, str]:
    """Code points ("1f984") of every emoji without a skin tone, by name ("unicorn")."""
    chars = json.loads((folder / "flat/package/chars.json").read_text())
    plain = {code: name for code, name in chars.items() if not set(code.split("-")) & {*SKIN_TONES}}
    return {name: code for code, name in plain.items()}


def _svg(icons: dict, name: str) -> str | None:
    """SVG text of an icon of an Iconify set, None where the set lacks it."""
    name = icons.get("aliases", {}).get(name, {}).get("parent", name)
    if name not in icons["icons"]:
        return None
    icon = icons["icons"][name]
    width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
    )


def _rendered(svg: str) -> Image.Image:
    import resvg_py

    png = resvg_py.svg_to_bytes(svg_string=svg, width=2 * SIDE, skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(png))).convert("RGBA")


def _fitted(image: Image.Image) -> Image.Image | None:
    """The visible part with its longer side at SIDE; None where nothing is visible."""
    box = image.getchannel("A").point(lambda a: 255 * (a > 8)).getbbox()
    if box is None:
        return None
    image = image.crop(box)
    ratio = SIDE / max(image.size)
    size = tuple(max(1, round(side * ratio)) for side in image.size)
    return image.resize(size, Image.Resampling.LANCZOS)


def _draw_all(folder: Path) -> None:
    """Write `sprites.npy` and `sprites.json`."""
    names = _names(folder)
    icons = {
        style: json.loads((folder / style / "package/icons.json").read_text())
        for style in SETS
        if style != "3d"
    }
    assets = (folder / "3d/package/assets").glob("*.webp")  # names carry the emoji selector, fe0f
    solid = {path.stem.replace("-fe0f", ""): path for path in assets}
    found: list[tuple[str, str, Image.Image]] = []
    for style in SETS:
        for name, code in names.items():
            if style == "3d":
                image = Image.open(solid[code]).convert("RGBA") if code in solid else None
            else:
                svg = _svg(icons[style], name)
                image = _rendered(svg) if svg else None
            fitted = _fitted(image) if image else None
            if fitted:
                found.append((style, name, fitted))
    pixels = np.zeros((len(found), SIDE, SIDE, 4), np.uint8)
    for index, (_, _, image) in enumerate(found):
        pixels[index, : image.height, : image.width] = np.asarray(image)
    index = [[style, name, image.width, image.height] for style, name, image in found]
    (folder / "sprites.json").write_text(json.dumps(index))
    np.save(folder / "sprites.tmp.npy", pixels)
    (folder / "sprites.tmp.npy").replace(folder / "sprites.npy")


@cache
def sprites(folder: Path = FOLDER) -> Sprites:
    """The sprites that `fetch` drew, mapped into memory."""
    index = json.loads((folder / "sprites.json").read_text())
    keys = {(style, name): (i, w, h) for i, (style, name, w, h) in enumerate(index)}
    return Sprites(np.load(folder / "sprites.npy", mmap_mode="r"), keys)


@cache
def training_keys() -> tuple[tuple[str, str], ...]:
    """(set, name) of every emoji that may be trained on."""
    return tuple(key for key in sprites().keys if key[1] not in HELD_OUT)
