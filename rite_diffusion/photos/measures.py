"""Measures of one picture that the photos' report is made of: sharpness, ground, frame, subject.

All are taken on small copies, in a few milliseconds, when a photo is checked.
"""

import numpy as np
from PIL import Image

from rite_diffusion.types import PhotoMeasures

THUMBNAIL = 48  # cells on each side of the colour thumbnail
GREY = 128  # cells on each side of the grey thumbnail
SIDE = 512  # pixels of the longer side of the copy on which sharpness and frame are measured
TILES = 4  # on each side, of which the sharpest counts
BLUR_TAPS = 9  # of the moving mean with which a tile is blurred again
CONTRAST = 10.0  # grey levels (standard deviation) that a tile needs to be measured
FRAME_LEVELS = 10  # grey levels by which the colours of a strip may differ
FRAME_JUMP = 24  # grey levels between a strip and what is inside it
FRAME_SHARE = 0.6  # of the length of a strip, along which there is such a jump
FRAME_DEPTHS = (0.01, 0.4)  # of the picture's side: strips of these depths count


def measure(image: Image.Image) -> PhotoMeasures:
    """The measures of an upright RGB picture."""
    small = image.copy()
    small.thumbnail((SIDE, SIDE), Image.Resampling.BOX)
    grey = small.convert("L")
    return PhotoMeasures(
        _shrunk(small, THUMBNAIL),
        _shrunk(grey, GREY),
        sharpness(np.asarray(grey, np.float32)),
        frame(np.asarray(small, np.int16)),
    )


def _shrunk(image: Image.Image, side: int) -> np.ndarray:
    return np.asarray(image.resize((side, side), Image.Resampling.BOX))


def sharpness(grey: np.ndarray) -> float:
    """Sharpness in [0, 1] of the sharpest of 4 x 4 tiles (h, w): 1 less the blur effect.

    The blur effect (Crete et al. 2007, "The blur effect") blurs a picture again, along rows or
    columns, and measures how little the differences between neighbours shrink. Tiles with little
    contrast are not measured: a plain ground is not blurred. 1 where no tile has contrast.
    """
    found = []
    for rows in np.array_split(grey, TILES, axis=0):
        for tile in np.array_split(rows, TILES, axis=1):
            if min(tile.shape) > BLUR_TAPS and tile.std() >= CONTRAST:
                found.append(min(_sharpness_along(tile), _sharpness_along(tile.T)))
    return max(found, default=1.0)


def _sharpness_along(tile: np.ndarray) -> float:
    """The part of the differences along rows that a second blur takes away."""
    before = np.abs(np.diff(tile, axis=1))[:, BLUR_TAPS // 2 : -(BLUR_TAPS // 2)]
    sums = np.cumsum(np.pad(tile, ((0, 0), (1, 0))), axis=1)
    after = np.abs(np.diff(sums[:, BLUR_TAPS:] - sums[:, :-BLUR_TAPS], axis=1)) / BLUR_TAPS
    total = before.sum()
    return float(np.maximum(before - after, 0).sum() / total) if total else 0.0


def frame(pixels: np.ndarray) -> float:
    """The depth of a plain frame around a picture (h, w, 3), as a share of its side; 0 without one.

    A frame is a strip of one colour on two opposite sides or all four, such as a letterbox, whose
    inner edge differs from it along most of its length. A plain ground has no such edge.
    """
    top, bottom = _strip(pixels), _strip(pixels[::-1])
    turned = pixels.transpose(1, 0, 2)
    left, right = _strip(turned), _strip(turned[::-1])
    return max(min(top, bottom), min(left, right))


def _strip(pixels: np.ndarray) -> float:
    """The depth of a strip of one colour along the first rows, as a share of all rows."""
    colour = np.median(pixels[0], axis=0)
    near = (np.abs(pixels - colour).max(2) <= FRAME_LEVELS).mean(1) >= 0.98  # of each row
    depth = len(near) if near.all() else int(near.argmin())
    low, high = FRAME_DEPTHS
    if not low * len(pixels) <= depth <= high * len(pixels):
        return 0.0
    inside = np.abs(pixels[depth : depth + 3] - colour).max(2).max(0)
    return depth / len(pixels) if (inside > FRAME_JUMP).mean() >= FRAME_SHARE else 0.0
