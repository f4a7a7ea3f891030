"""A toy robot drawn by code: an object of our own that no emoji and no photograph shows.

Parts are masks, drawn eight times too large for smooth edges and then lit like soft plastic.
Coordinates are in units of 1/64 of the picture's side, x to the right and y down.
"""

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

SIDE = 256  # pixels of the finished picture
OVERSAMPLING = 8
UNIT = SIDE * OVERSAMPLING / 64  # pixels of a unit while drawing

Colour = tuple[int, int, int]
Part = tuple[Image.Image, Colour, float]  # mask, colour, how round it looks (units)

TEAL = (34, 182, 176)
DEEP_TEAL = (20, 136, 140)
ORANGE = (255, 138, 34)
YELLOW = (255, 200, 40)
CREAM = (255, 246, 226)
STEEL = (122, 138, 156)
INK = (36, 42, 62)
SHADOW = np.asarray((40, 30, 70), np.float32)


def box(left: float, top: float, right: float, bottom: float, radius: float) -> Image.Image:
    """Mask of a rectangle with round corners."""
    sheet, pen = _sheet()
    corners = [side * UNIT for side in (left, top, right, bottom)]
    pen.rounded_rectangle(corners, radius * UNIT, fill=255)
    return sheet.reduce(OVERSAMPLING)


def disc(x: float, y: float, radius: float) -> Image.Image:
    """Mask of a circle."""
    return box(x - radius, y - radius, x + radius, y + radius, radius)


def capsule(x0: float, y0: float, x1: float, y1: float, width: float) -> Image.Image:
    """Mask of a thick line with round ends."""
    sheet, pen = _sheet()
    pen.line([side * UNIT for side in (x0, y0, x1, y1)], fill=255, width=round(width * UNIT))
    ends = ImageChops.lighter(disc(x0, y0, width / 2), disc(x1, y1, width / 2))
    return ImageChops.lighter(sheet.reduce(OVERSAMPLING), ends)


def smile(x: float, y: float, radius: float, width: float) -> Image.Image:
    """Mask of the lower part of a ring, 100 degrees wide, with round ends."""
    sheet, pen = _sheet()
    outer = [side * UNIT for side in (x - radius, y - radius, x + radius, y + radius)]
    pen.arc(outer, 40, 140, fill=255, width=round(width * UNIT))
    mask = sheet.reduce(OVERSAMPLING)
    for angle in np.radians((40, 140)):
        reach = radius - width / 2
        end = disc(x + reach * np.cos(angle), y + reach * np.sin(angle), width / 2)
        mask = ImageChops.lighter(mask, end)
    return mask


def claw(x: float, y: float, radius: float, direction: float) -> Image.Image:
    """Mask of a gripping hand: a ring that opens towards `direction` (degrees, 90 is down)."""
    sheet, pen = _sheet()
    outer = [side * UNIT for side in (x - radius, y - radius, x + radius, y + radius)]
    pen.arc(outer, direction + 42, direction - 42, fill=255, width=round(0.58 * radius * UNIT))
    return sheet.reduce(OVERSAMPLING)


def _sheet() -> tuple[Image.Image, ImageDraw.ImageDraw]:
    sheet = Image.new("L", (SIDE * OVERSAMPLING,) * 2)
    return sheet, ImageDraw.Draw(sheet)


def limbs() -> list[Part]:
    """Antenna, ears, neck, arms, legs and feet."""
    return [
        (capsule(32, 5, 32, 14, 2.2), STEEL, 0.6),  # antenna
        (disc(32, 5, 4), YELLOW, 2),
        (box(9.5, 17, 16, 26, 2.6), ORANGE, 1.2),  # ears
        (box(48, 17, 54.5, 26, 2.6), ORANGE, 1.2),
        (box(27, 28, 37, 35, 1), STEEL, 1),  # neck
        (capsule(17, 38, 10.5, 44.5, 5.4), ORANGE, 1.4),  # arms: one hangs, one waves
        (capsule(47, 38, 54, 33.5, 5.4), ORANGE, 1.4),
        (claw(8, 48, 5, 112), DEEP_TEAL, 0.9),
        (claw(57, 29.5, 5, -62), DEEP_TEAL, 0.9),
        (box(20, 48, 29, 60, 2), ORANGE, 1.4),  # legs
        (box(35, 48, 44, 60, 2), ORANGE, 1.4),
        (box(16.5, 56, 30, 63, 3.2), DEEP_TEAL, 1.4),  # feet
        (box(34, 56, 47.5, 63, 3.2), DEEP_TEAL, 1.4),
    ]


def trunk() -> list[Part]:
    """Body with its dial."""
    return [
        (box(16, 33, 48, 52.5, 5), TEAL, 2),
        (disc(32, 42.8, 7.8), ORANGE, 1.2),  # belly dial
        (disc(32, 42.8, 4.9), CREAM, 0.6),
        (capsule(32, 42.8, 34.2, 40.6, 1.7), INK, 0.2),
    ]


def head() -> list[Part]:
    """Head with its face."""
    return [
        (box(13, 12, 51, 31, 7), TEAL, 2),
        (disc(23.6, 20.4, 6.4), CREAM, 1.2),  # eyes
        (disc(40.4, 20.4, 6.4), CREAM, 1.2),
        (disc(24.7, 20.8, 3.7), INK, 0.4),
        (disc(39.3, 20.8, 3.7), INK, 0.4),
        (disc(23.4, 19.3, 1.3), CREAM, 0.1),  # their glints
        (disc(38, 19.3, 1.3), CREAM, 0.1),
        (smile(32, 22.8, 6.4, 1.7), INK, 0.1),
    ]


def lit(mask: Image.Image, colour: Colour, depth: float) -> np.ndarray:
    """Colours (256, 256, 3) of a part with light from the upper left, 0 to 255.

    The mask, blurred by `depth` units, is a soft hill; its slope along the diagonal is the shade.
    """
    pixels = depth * SIDE / 64
    hill = mask.filter(ImageFilter.GaussianBlur(pixels))
    step = max(1, round(pixels))
    before, after = (
        np.asarray(ImageChops.offset(hill, way, way), np.float32) / 255 for way in (step, -step)
    )
    slope = (after - before)[..., None]  # in [-1, 1], positive where the part faces the light
    base = np.asarray(colour, np.float32)
    towards = np.where(slope > 0, 255, SHADOW)
    return base + 0.5 * np.abs(slope) * (towards - base)


def robot() -> Image.Image:
    """RGBA picture of the robot, cropped to what is visible."""
    return assembled(limbs() + trunk() + head())


def assembled(parts: list[Part]) -> Image.Image:
    """RGBA picture of parts, the first behind the others, cropped to what is visible."""
    canvas = np.zeros((SIDE, SIDE, 3), np.float32)
    alpha = np.zeros((SIDE, SIDE, 1), np.float32)
    for mask, colour, depth in parts:
        cover = np.asarray(mask, np.float32)[..., None] / 255
        canvas = canvas * (1 - cover) + lit(mask, colour, depth) * cover
        alpha = alpha * (1 - cover) + cover
    colours = canvas / np.maximum(alpha, 1e-6)  # back from premultiplied
    pixels = np.concatenate([colours, 255 * alpha], axis=-1).clip(0, 255).round()
    image = Image.fromarray(pixels.astype(np.uint8))
    return image.crop(image.getchannel("A").getbbox())
