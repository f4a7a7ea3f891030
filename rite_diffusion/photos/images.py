"""Any picture file as upright RGB with the colours that its maker saw."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"}
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
MAX_PIXELS = 100_000_000


class UnreadableImage(Exception):
    """The picture cannot be used; the message is the reason."""


def _flatten(image: Image.Image) -> Image.Image:
    """RGB of any mode: 16-bit greys scaled, transparency laid on white."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, np.float64)
        peak = 65535 if values.max() > 255 else 255
        return Image.fromarray((values * 255 / peak).clip(0, 255).astype(np.uint8)).convert("RGB")
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def open_image(path: Path) -> Image.Image:
    """The picture as upright RGB; of an animation its first frame.

    Raises UnreadableImage for what is no picture, is cut off, or has over 100 megapixels.
    """
    return _flatten(_open(path))


def open_mask(path: Path, size: tuple[int, int]) -> Image.Image:
    """A mask file as greys of a size; raises UnreadableImage as `open_image` does."""
    mask = _flatten(_open(path)).convert("L")
    return mask if mask.size == size else mask.resize(size, Image.Resampling.BILINEAR)


def transparency_mask(path: Path) -> Image.Image | None:
    """The picture's opacity as a mask, None where all of it is opaque."""
    image = _open(path)
    if "A" not in image.getbands() and "transparency" not in image.info:
        return None
    alpha = image.convert("RGBA").getchannel("A")
    return None if alpha.getextrema()[0] == 255 else alpha


def _open(path: Path) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise UnreadableImage(f"too large: {width}x{height} pixels")
                image.load()
                return ImageOps.exif_transpose(image)
    except UnidentifiedImageError:
        raise UnreadableImage("not a picture") from None
    except Image.DecompressionBombError:
        raise UnreadableImage(f"too large: over {MAX_PIXELS:,} pixels") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise UnreadableImage(f"damaged: {error}") from None


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
