"""Made-up figures, in families that differ in a part or two: learned besides emoji."""

from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from .emoji import SIDE

SEED = 910_000
FIGURES, VARIANTS = 300, 4  # families, and figures in each
SCALE = 2  # at which figures are drawn, for smooth edges
Generator = np.random.Generator


@dataclass(frozen=True)
class Part:
    """One shape of a figure; lengths are shares of the figure's side."""

    kind: int  # ellipse, box or polygon
    centre: np.ndarray
    reach: np.ndarray
    corners: np.ndarray  # of a polygon
    colour: tuple[int, int, int]
    is_mirrored: bool


def random_part(rng: Generator, colour: tuple[int, int, int], is_body: bool) -> Part:
    """A part anywhere, or a large one near the centre."""
    centre = 0.5 + (rng.normal(0, 0.03, 2) if is_body else rng.uniform(-0.36, 0.36, 2))
    reach = rng.uniform(0.24, 0.42, 2) if is_body else rng.uniform(0.035, 0.2, 2)
    corners = rng.uniform(-1, 1, (int(rng.integers(3, 7)), 2))
    return Part(int(rng.integers(3)), centre, reach, corners, colour, rng.random() < 0.6)


def random_colour(rng: Generator) -> tuple[int, int, int]:
    """Any colour."""
    red, green, blue = (int(value) for value in rng.integers(0, 256, 3))
    return red, green, blue


def random_figure(rng: Generator) -> list[Part]:
    """A body with parts in a few colours, many of them mirrored."""
    palette = [random_colour(rng) for _ in range(rng.integers(2, 6))]
    count = int(rng.integers(4, 12))
    return [random_part(rng, palette[i % len(palette)], is_body=i == 0) for i in range(count)]


def varied(rng: Generator, parts: list[Part]) -> list[Part]:
    """Another figure of the same kind: one to three of its parts differ."""
    parts = list(parts)
    for index in rng.choice(len(parts), int(rng.integers(1, 4)), replace=False):
        old = parts[index]
        match rng.integers(3):
            case 0:
                parts[index] = replace(old, colour=random_colour(rng))
            case 1:
                parts[index] = replace(old, centre=old.centre + rng.normal(0, 0.12, 2))
            case _:
                parts[index] = random_part(rng, random_colour(rng), is_body=index == 0)
    return parts


def _layer(part: Part) -> Image.Image:
    side = SIDE * SCALE
    layer = Image.new("RGBA", (side, side))
    pen = ImageDraw.Draw(layer)
    centre, reach = part.centre * side, part.reach * side
    box = [*(centre - reach), *(centre + reach)]
    match part.kind:
        case 0:
            pen.ellipse(box, part.colour)
        case 1:
            pen.rounded_rectangle(box, min(reach) / 2, part.colour)
        case _:
            pen.polygon([tuple(corner) for corner in centre + reach * part.corners], part.colour)
    return layer


def drawn(parts: list[Part]) -> Image.Image:
    """RGBA picture of a figure, its longer side at SIDE."""
    canvas = Image.new("RGBA", (SIDE * SCALE,) * 2)
    for part in parts:
        layer = _layer(part)
        canvas.alpha_composite(layer)
        if part.is_mirrored:
            canvas.alpha_composite(ImageOps.mirror(layer))
    canvas = canvas.crop(canvas.getbbox())
    return ImageOps.contain(canvas, (SIDE, SIDE), Image.Resampling.LANCZOS)


@cache
def figure(number: int, variant: int) -> Image.Image:
    """Variant of a made-up figure, the first being the figure itself."""
    parts = random_figure(np.random.default_rng([SEED, number]))
    rng = np.random.default_rng([SEED, number, variant])
    return drawn(varied(rng, parts) if variant else parts)
