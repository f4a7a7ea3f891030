"""Varied pictures for the autoencoder: emoji in and out of scenes, shapes, text, photographs.

A picture is drawn by a `numpy.random.Generator`, so a seed gives the same picture everywhere.
"""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from . import emoji, world

SIZE = world.SIZE
Generator = np.random.Generator

PHOTOGRAPHS = {
    "skimage": "data/",
    "sklearn": "datasets/images/",
}
PHOTOGRAPH_FILES = (
    ("skimage", "astronaut.png coffee.png hubble_deep_field.jpg brick.png grass.png gravel.png"),
    ("skimage", "retina.jpg ihc.png coins.png camera.png rocket.jpg"),
    ("sklearn", "china.jpg flower.jpg"),
)


@cache
def photographs() -> list[Image.Image]:
    """Freely licensed photographs that scikit-image and scikit-learn ship (see NOTICE)."""
    import skimage
    import sklearn

    roots = {"skimage": Path(skimage.__file__).parent, "sklearn": Path(sklearn.__file__).parent}
    paths = [
        roots[package] / PHOTOGRAPHS[package] / name
        for package, names in PHOTOGRAPH_FILES
        for name in names.split()
    ]
    return [Image.open(path).convert("RGB") for path in paths]


def photo_crop(rng: Generator) -> np.ndarray:
    """A random square of a photograph, (SIZE, SIZE, 3) uint8, mirrored half of the time."""
    images = photographs()
    image = images[rng.integers(len(images))]
    side = int(rng.uniform(SIZE, min(image.size)))
    x, y = (int(rng.integers(0, extent - side + 1)) for extent in image.size)
    crop = image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, (x, y, x + side, y + side))
    return np.asarray(crop)[:, :: int(rng.choice([1, -1]))]


def any_ground(rng: Generator) -> np.ndarray:
    """A background (SIZE, SIZE, 3) float32: a named colour, any colour, or a photograph."""
    kind = rng.random()
    if kind < 0.5:
        return world.ground(rng, world.COLOURS[str(rng.choice(list(world.COLOURS)))])
    if kind < 0.9:
        return world.ground(rng, tuple(rng.uniform(0, 255, 3)), slope=30)
    return photo_crop(rng).astype(np.float32)


def scaled_by(rng: Generator, image: Image.Image) -> Image.Image:
    """A sprite, perhaps mirrored, turned or with changed colours."""
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rng.random() < 0.5:
        image = image.rotate(rng.uniform(-45, 45), Image.Resampling.BILINEAR, expand=True)
    if rng.random() < 0.3:
        bands = list(image.split())
        order = rng.permutation(3)
        image = Image.merge("RGBA", [bands[i] for i in order] + [bands[3]])
    return image


def any_sprite(rng: Generator) -> Image.Image:
    """Any emoji that may be trained on."""
    keys = emoji.training_keys()
    return emoji.sprites().image(*keys[rng.integers(len(keys))])


def emoji_scene(rng: Generator) -> np.ndarray:
    """Any emoji as the world shows its nouns: centred, small, at a side, or two of them."""
    count = 2 if rng.random() < 0.3 else 1
    images = [any_sprite(rng) for _ in range(count)]
    place = str(rng.choice(list(world.PLACES))) if rng.random() < 0.4 else "centre"
    return world.draw(rng, images, str(rng.choice(list(world.COLOURS))), place)


def clutter(rng: Generator) -> np.ndarray:
    """One to five random emoji, turned and recoloured, anywhere on any ground."""
    canvas = any_ground(rng)
    for _ in range(rng.integers(1, 6)):
        centre = tuple(rng.uniform(0.1, 0.9, 2) * SIZE)
        world.paste(canvas, scaled_by(rng, any_sprite(rng)), centre, rng.uniform(0.2, 1.0) * SIZE)
    return canvas.round().astype(np.uint8)


def rounded_box(
    pen: ImageDraw.ImageDraw, box: tuple[float, float, float, float], share: float, **style: Any
) -> None:
    """Draw a box whose corners are rounded by a share of half its shorter side.

    Pillow refuses corners that leave no straight line between them.
    """
    short = min(box[2] - box[0], box[3] - box[1])
    pen.rounded_rectangle(box, max(short / 2 - 3, 0) * share, **style)


def shapes(rng: Generator) -> np.ndarray:
    """Ellipses, boxes, lines, polygons and dots with or without outlines on any ground."""
    scale = 3  # drawn larger, then reduced, for smooth edges
    sheet = Image.fromarray(any_ground(rng).round().astype(np.uint8)).resize((SIZE * scale,) * 2)
    pen = ImageDraw.Draw(sheet)
    for _ in range(rng.integers(2, 14)):
        fill = tuple(int(c) for c in rng.integers(0, 256, 3))
        line = tuple(int(c) for c in rng.integers(0, 256, 3))
        x, y = rng.uniform(0, SIZE * scale, 2)
        w, h = rng.uniform(4, SIZE * scale * rng.uniform(0.05, 0.6), 2)
        width = min(int(rng.integers(0, 5)) * scale, int(min(w, h) / 4))
        box = (x - w / 2, y - h / 2, x + w / 2, y + h / 2)
        match rng.integers(5):
            case 0:
                pen.ellipse(box, fill, line, width)
            case 1:
                rounded_box(pen, box, rng.uniform(0, 0.8), fill=fill, outline=line, width=width)
            case 2:
                pen.line(
                    [tuple(rng.uniform(0, SIZE * scale, 2)) for _ in range(3)], fill, width + 1
                )
            case 3:
                pen.polygon([tuple((x, y) + rng.normal(0, w, 2)) for _ in range(4)], fill, line)
            case 4:
                pen.arc(box, rng.uniform(0, 360), rng.uniform(0, 360), fill, width + scale)
    return np.asarray(sheet.reduce(scale))


@cache
def fonts() -> list[Path]:
    """Fonts of this machine that Pillow opens; its own where there are none."""
    folders = [Path("/usr/share/fonts"), Path("/usr/local/share/fonts")]
    return sorted(path for folder in folders for path in folder.rglob("*.ttf"))


def text(rng: Generator) -> np.ndarray:
    """A few lines of letters and figures in any size on any ground."""
    image = Image.fromarray(any_ground(rng).round().astype(np.uint8))
    pen = ImageDraw.Draw(image)
    letters = np.array(list("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789!?&%.,"))
    for _ in range(rng.integers(1, 6)):
        size = int(rng.uniform(9, 60))
        paths = fonts()
        font = (
            ImageFont.truetype(paths[rng.integers(len(paths))], size)
            if paths
            else ImageFont.load_default(size)
        )
        words = "".join(rng.choice(letters, rng.integers(1, 10)))
        fill = tuple(int(c) for c in rng.integers(0, 256, 3))
        pen.text(tuple(rng.uniform(-10, SIZE * 0.8, 2)), words, fill, font)
    return np.asarray(image)


def altered(rng: Generator, image: np.ndarray) -> np.ndarray:
    """The picture with brightness and contrast changed, now and then blurred a little."""
    if rng.random() < 0.2:
        gain, offset = rng.uniform(0.6, 1.3), rng.uniform(-40, 40)
        image = ((image.astype(np.float32) - 128) * gain + 128 + offset).clip(0, 255)
        image = image.round().astype(np.uint8)
    if rng.random() < 0.05:
        blur = ImageFilter.GaussianBlur(rng.uniform(0.3, 1.5))
        image = np.asarray(Image.fromarray(image).filter(blur))
    return image


def world_scene(rng: Generator) -> np.ndarray:
    """A scene of the world."""
    return world.scene(rng).image


KINDS = (
    (world_scene, 0.2),
    (emoji_scene, 0.3),
    (clutter, 0.25),
    (shapes, 0.08),
    (text, 0.05),
    (photo_crop, 0.12),
)


def any_image(rng: Generator) -> np.ndarray:
    """A picture (SIZE, SIZE, 3) uint8 for the autoencoder, of a kind drawn by its share."""
    draws, shares = zip(*KINDS, strict=True)
    kind = draws[rng.choice(len(draws), p=shares)]
    return altered(rng, kind(rng))
