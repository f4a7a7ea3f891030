"""Masks of photos: white where the subject is."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from rite_diffusion.errors import PhotoFolderError
from rite_diffusion.photos.images import ORIENTATION, Upright, open_pixels
from rite_diffusion.photos.pixels import UnreadableImage, on_white, opacity

MIN_WHITE = 64  # least value that the lightest pixel of a mask may have
TRANSPOSED = (5, 6, 7, 8)  # EXIF orientations that swap width and height
SAME_SHAPE = 0.02  # largest relative difference of aspect ratios


def mask_of(photo: Upright, path: Path | None) -> Image.Image | None:
    """The photo's mask (mode L, of its size): that of a file, else its opacity, else None.

    Raises PhotoFolderError where the file is damaged, has another shape than the photo, or is all
    black; UnreadableImage where the photo is transparent everywhere.
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
    """The mean of a mask: 0 if all black, 1 if all white."""
    return float(np.asarray(mask, np.float32).mean() / 255)


def greys_of(mask: Image.Image, path: Path) -> Image.Image:
    """A mask of any mode as grey values (mode L).

    If there are two values, 0 and another, the other becomes white, as in label maps of 0 and 1.
    Transparent pixels become black. Raises PhotoFolderError for a mask that is dark everywhere.
    """
    alpha = opacity(mask)
    if alpha is not None:
        return _of_transparent(mask, alpha)
    values = np.asarray(mask.convert("L") if mask.mode == "1" else mask)
    if values.ndim == 2 and mask.mode != "P":  # before scaling makes small values 0
        levels = np.unique(values)
    else:
        values = np.asarray(on_white(mask).convert("L"))
        levels = np.unique(values)
    if len(levels) == 2 and levels[0] == 0:
        return Image.fromarray(np.where(values > 0, 255, 0).astype(np.uint8))
    greys = on_white(mask).convert("L")
    lightest = int(np.asarray(greys).max())
    if 0 < lightest < MIN_WHITE:
        raise PhotoFolderError(
            f"the mask {path} is dark all over: its lightest grey is {lightest} of 255. Make the "
            "subject white and the rest black."
        )
    return greys


def _of_transparent(mask: Image.Image, alpha: Image.Image) -> Image.Image:
    """The grey values of a mask with transparency.

    If its opaque pixels are black and white, white is the subject. Otherwise it is a cut-out photo
    or painted in one colour, and all opaque pixels are the subject.
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
    """The colours of a picture, its transparency removed."""
    return mask.convert("RGBA").convert("RGB")


def _in_frame(mask: Image.Image, photo: Upright, path: Path) -> Image.Image:
    """The mask in the size of its photo; PhotoFolderError for another shape.

    A mask of the file's unturned pixels is turned by the photo's EXIF orientation.
    """
    if not _same_shape(mask.size, photo.image.size):
        (width, height), (across, down) = photo.image.size, mask.size
        if photo.orientation not in TRANSPOSED or not _same_shape(mask.size, (height, width)):
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
    """Whether two sizes have the same aspect ratio, to a pixel or two percent."""
    scaled = one[0] * other[1] / other[0]
    return abs(scaled - one[1]) <= max(1.0, SAME_SHAPE * one[1])
