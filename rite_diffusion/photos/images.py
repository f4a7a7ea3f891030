"""Any picture file as upright RGB with the colours that its maker saw."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from struct import error as StructError

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from rite_diffusion.photos.pixels import UnreadableImage, on_white, opacity

SUFFIXES = {
    ".jpg", ".jpeg", ".jpe", ".jfif", ".pjpeg", ".pjp", ".png", ".apng", ".webp", ".bmp", ".tif",
    ".tiff", ".gif", ".avif", ".heic", ".heif",
}  # fmt: skip
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF")
HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
MAX_PIXELS = 100_000_000
ORIENTATION = 0x0112  # the EXIF tag


@dataclass(frozen=True)
class Upright:
    """A picture file, turned as its EXIF says."""

    image: Image.Image  # RGB, transparency laid on white
    opacity: Image.Image | None  # mode L; None where all of it is opaque
    orientation: int  # EXIF's, from 1 to 8, by which the file's pixels were turned


def open_image(path: Path) -> Image.Image:
    """The picture as upright RGB; of an animation its first frame.

    Raises UnreadableImage for what is no picture, is cut off, or has over 100 megapixels.
    """
    return open_upright(path).image


def open_upright(path: Path) -> Upright:
    """The picture with its opacity and how it was turned; raises as `open_image` does."""
    image, orientation = open_pixels(path)
    try:
        return Upright(on_white(image), opacity(image), orientation)
    except (OSError, ValueError) as error:
        raise UnreadableImage(f"damaged: {error}") from None


def open_pixels(path: Path) -> tuple[Image.Image, int]:
    """The picture in its own mode, upright, and the EXIF orientation by which it was turned."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged EXIF, of large pictures
            with Image.open(path, formats=_formats()) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise UnreadableImage(f"too large: {width}x{height} pixels")
                orientation = image.getexif().get(ORIENTATION, 1)
                image.load()
                ImageOps.exif_transpose(image, in_place=True)
                return image, orientation
    except UnidentifiedImageError:
        raise UnreadableImage(_unidentified(path)) from None
    except Image.DecompressionBombError:
        raise UnreadableImage(f"too large: over {MAX_PIXELS:,} pixels") from None
    except PermissionError as error:
        raise UnreadableImage(f"cannot be read: {error.strerror}") from None
    except (OSError, SyntaxError, ValueError, StructError) as error:
        raise UnreadableImage(f"damaged: {error}") from None


@lru_cache(maxsize=1)
def _formats() -> tuple[str, ...]:
    """The formats that are read: with pillow-heif, HEIF too."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return FORMATS
    register_heif_opener()
    return (*FORMATS, "HEIF")


def _unidentified(path: Path) -> str:
    """Why a file is not opened: no picture, or one that needs an extra."""
    with path.open("rb") as stream:
        start = stream.read(12)
    if start[4:8] == b"ftyp" and start[8:12] in HEIF_BRANDS and "HEIF" not in _formats():
        return "HEIC, which needs pillow-heif: pip install 'rite-diffusion[heic]'"
    return "not a picture"


def fit(image: Image.Image, width: int, height: int) -> Image.Image:
    """The picture's centre in the wanted size: scaled to cover it, then cropped."""
    return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)


def mask_tensor(mask: Image.Image, cells: Sequence[int]) -> Tensor:
    """The mask (1, h, w) in [0, 1] of latent cells, of a mask that is cut as its picture is."""
    small = mask.resize((cells[1], cells[0]), Image.Resampling.BOX)
    return torch.from_numpy(np.asarray(small, np.float32) / 255)[None]


def perceptual_hash(image: Image.Image) -> int:
    """64 bits that near-duplicates share but for a few: each of 8x8 spots against the next."""
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), np.int16)
    bits = (grey[:, 1:] > grey[:, :-1]).flatten()
    return int("".join("1" if bit else "0" for bit in bits), 2)


def to_tensor(image: Image.Image) -> Tensor:
    """Pixels (3, H, W) in [-1, 1]."""
    array = np.asarray(image, np.float32) / 127.5 - 1
    return torch.from_numpy(array).permute(2, 0, 1).contiguous()


def to_image(pixels: Tensor) -> Image.Image:
    """Picture of pixels (3, H, W) in [-1, 1]."""
    array = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0)
    return Image.fromarray(array.cpu().numpy())
