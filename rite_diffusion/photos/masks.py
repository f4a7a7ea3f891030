"""Masks in their photos' frames: white is what is learned."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from rite_diffusion.errors import PhotoFolderError
from rite_diffusion.photos.images import ORIENTATION, Upright, open_pixels
from rite_diffusion.photos.pixels import UnreadableImage, on_white, opacity

DARKEST = 64  # least grey that the lightest part of a mask has
TURNED = (5, 6, 7, 8)  # EXIF orientations that exchange width and height
SAME_SHAPE = 0.02  # most by which two ratios of width to height differ, as a share


def mask_of(photo: Upright, path: Path | None) -> Image.Image | None:
    """The photo's mask (mode L, of its size): a file's, else its opacity, else none.

    Raises PhotoFolderError where the file is damaged, has another shape than the photo, or nothing
    in it is white; UnreadableImage where nothing of the photo is opaque.
    """
    if path is None:
        if photo.opacity is not None and photo.opacity.getextrema()[1] == 0:
            raise UnreadableImage("transparent all over")
        return photo.opacity
    try:
        mask, _ = open_pixels(path)
    except UnreadableImage as fault:
        raise PhotoFolderError(
            f"the mask {path} cannot be used: {fault}. Make it again, or take it away."
        ) from None
    mask = _in_frame(greys_of(mask, path), photo, path)
    if white_share(mask) == 0:
        raise PhotoFolderError(
            f"the mask {path} is black: nothing of its photo would be learned. Make the subject "
            "white, or take the mask away."
        )
    return mask


def white_share(mask: Image.Image) -> float:
    """How much of a mask is white: 0 for black, 1 for all."""
    return float(np.asarray(mask, np.float32).mean() / 255)


def greys_of(mask: Image.Image, path: Path) -> Image.Image:
    """A mask of any mode as greys (mode L) from black to white.

    Of two values, 0 and another, the other is white, as in label maps of 0 and 1. A transparent
    ground is black. Raises PhotoFolderError where the mask is dark all over but not black.
    """
    alpha = opacity(mask)
    if alpha is not None:
        return _of_transparent(mask, alpha)
    values = np.asarray(mask.convert("L") if mask.mode == "1" else mask)
    if values.ndim == 2 and mask.mode != "P":  # before small numbers vanish in the scaling
        levels = np.unique(values)
    else:
        values = np.asarray(on_white(mask).convert("L"))
        levels = np.unique(values)
    if len(levels) == 2 and levels[0] == 0:
        return Image.fromarray(np.where(values > 0, 255, 0).astype(np.uint8))
    greys = on_white(mask).convert("L")
    lightest = int(np.asarray(greys).max())
    if 0 < lightest < DARKEST:
        raise PhotoFolderError(
            f"the mask {path} is dark all over: its lightest grey is {lightest} of 255. Make the "
            "subject white and the rest black."
        )
    return greys


def _of_transparent(mask: Image.Image, alpha: Image.Image) -> Image.Image:
    """The greys of a mask with transparency.

    Drawn in black and white, its white counts where it is opaque. Else it is a picture that was
    cut out, or was painted in one dark colour, and what is opaque is the subject.
    """
    greys = np.asarray(on_white(_opaque(mask)).convert("L"))
    seen = greys[np.asarray(alpha) > 127]
    drawn = (
        ((seen < 32) | (seen > 223)).mean() > 0.95 and (seen > 223).any() if seen.size else False
    )
    if not drawn:
        return alpha
    return Image.fromarray((greys * (np.asarray(alpha, np.float32) / 255)).astype(np.uint8))


def _opaque(mask: Image.Image) -> Image.Image:
    """The colours of a picture without its transparency."""
    return mask.convert("RGBA").convert("RGB")


def _in_frame(mask: Image.Image, photo: Upright, path: Path) -> Image.Image:
    """The mask in the size of its photo.

    A mask that was drawn on the file's pixels, before EXIF turned them, is turned as they were.
    """
    if not _same_shape(mask.size, photo.image.size):
        (width, height), (across, down) = photo.image.size, mask.size
        if photo.orientation not in TURNED or not _same_shape(mask.size, (height, width)):
            raise PhotoFolderError(
                f"the mask {path} is {across}x{down}, and its photo {width}x{height}: make a mask "
                "of the photo's shape, or take it away."
            )
        mask.getexif()[ORIENTATION] = photo.orientation
        mask = ImageOps.exif_transpose(mask)
    if mask.size == photo.image.size:
        return mask
    return mask.resize(photo.image.size, Image.Resampling.BILINEAR)


def _same_shape(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether two sizes have one ratio of width to height, to a pixel or two percent."""
    scaled = one[0] * other[1] / other[0]
    return abs(scaled - one[1]) <= max(1.0, SAME_SHAPE * one[1])
