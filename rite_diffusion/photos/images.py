"""Picture files as upright sRGB, and conversion from and to tensors."""

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
    """The content of a picture file, turned by its EXIF orientation."""

    image: Image.Image  # RGB, on white where transparent
    opacity: Image.Image | None  # mode L; None if opaque everywhere
    orientation: int  # of EXIF, 1 to 8


def open_image(path: Path) -> Image.Image:
    """The picture as upright RGB, of an animation the first frame.

    Raises UnreadableImage for other files, damaged pictures, and those above 100 megapixels.
    """
    return open_upright(path).image


def open_upright(path: Path) -> Upright:
    """The picture with opacity and orientation; raises as `open_image` does."""
    image, orientation = open_pixels(path)
    try:
        return Upright(on_white(image), opacity(image), orientation)
    except (OSError, ValueError) as error:
        raise UnreadableImage(f"damaged: {error}") from None


def open_pixels(path: Path) -> tuple[Image.Image, int]:
    """The picture, upright and in its own mode, and its EXIF orientation."""
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
    """The formats that can be read; HEIF if pillow-heif is installed."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return FORMATS
    register_heif_opener()
    return (*FORMATS, "HEIF")


def _unidentified(path: Path) -> str:
    """Why Pillow cannot open a file: not a picture, or HEIC without pillow-heif."""
    with path.open("rb") as stream:
        start = stream.read(12)
    if start[4:8] == b"ftyp" and start[8:12] in HEIF_BRANDS and "HEIF" not in _formats():
        return "HEIC, which needs pillow-heif: pip install 'rite-diffusion[heic]'"
    return "not a picture"


def fit(image: Image.Image, width: int, height: int) -> Image.Image:
    """The picture scaled to cover a size, then cropped to its centre."""
    return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)


def mask_tensor(mask: Image.Image, cells: Sequence[int]) -> Tensor:
    """The mask of latent cells (1, h, w) in [0, 1]; `cells` is (h, w)."""
    small = mask.resize((cells[1], cells[0]), Image.Resampling.BOX)
    return torch.from_numpy(np.asarray(small, np.float32) / 255)[None]


def to_tensor(image: Image.Image) -> Tensor:
    """Pixels (3, H, W) in [-1, 1]."""
    array = np.asarray(image, np.float32) / 127.5 - 1
    return torch.from_numpy(array).permute(2, 0, 1).contiguous()


def to_image(pixels: Tensor) -> Image.Image:
    """The picture of pixels (3, H, W) in [-1, 1], clipped to the range."""
    array = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0)
    return Image.fromarray(array.cpu().numpy())
