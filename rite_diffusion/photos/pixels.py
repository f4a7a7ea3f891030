"""Pixels of any mode, number type and colour profile as 8-bit sRGB."""

from functools import lru_cache
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image, ImageCms

# Mode in which a profile is applied -> the colour space that the profile must have.
SPACES = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}
MAX_FLOAT = 2.0  # largest value of a float picture that counts as one in [0, 1]


class UnreadableImage(Exception):
    """The picture cannot be used; the message says why."""


def on_white(image: Image.Image) -> Image.Image:
    """A picture of any mode as 8-bit sRGB, on white where transparent."""
    colours, alpha = rgb(image), opacity(image)
    if alpha is None:
        return colours
    colours.putalpha(alpha)
    white = Image.new("RGBA", colours.size, "white")
    return Image.alpha_composite(white, colours).convert("RGB")


def rgb(image: Image.Image) -> Image.Image:
    """A picture of any mode as 8-bit sRGB, without its transparency.

    An embedded ICC profile is applied. Without one, or with one that is damaged or of another
    colour space, values are taken as sRGB.
    """
    plain = _without_alpha(image)
    if plain.mode == "LAB":
        lab = ImageCms.createProfile("LAB")
        return _applied(plain, ImageCms.buildTransform(lab, _srgb(), "LAB", "RGB"))
    profile = image.info.get("icc_profile")
    if not profile:
        return plain.convert("RGB")
    if plain.mode not in SPACES:
        plain = plain.convert("RGB")
    for mode in dict.fromkeys((plain.mode, "RGB")):  # a grey picture may have an RGB profile
        transform = _to_srgb(profile, mode)
        if transform is not None:
            return _applied(plain.convert(mode), transform)
    return plain.convert("RGB")


def opacity(image: Image.Image) -> Image.Image | None:
    """The alpha channel (mode L), None if all pixels are opaque."""
    transparent = image.info.get("transparency")
    if _is_deep(image):
        if not isinstance(transparent, int):
            return None
        alpha = Image.fromarray(np.where(np.asarray(image) == transparent, 0, 255).astype(np.uint8))
    elif transparent is not None or image.mode in ("LA", "PA", "RGBA"):
        alpha = image.convert("RGBA").getchannel("A")
    else:
        return None
    return None if alpha.getextrema()[0] == 255 else alpha


def _is_deep(image: Image.Image) -> bool:
    """Whether a picture has one channel of more than 8 bits."""
    return image.mode.startswith("I") or image.mode == "F"


def _without_alpha(image: Image.Image) -> Image.Image:
    """The picture without transparency and palette, in a mode of 8 bits."""
    if _is_deep(image):
        return Image.fromarray(eight_bits(np.asarray(image)))
    if image.mode in ("1", "LA"):
        return image.convert("L")
    if image.mode in ("P", "PA", "RGBA", "RGBX"):
        return image.convert("RGB")
    return image


def eight_bits(values: np.ndarray) -> np.ndarray:
    """Values of any number type as uint8, scaled from their range.

    The range is [0, 1] for floats up to MAX_FLOAT; otherwise [0, 255] or [0, 65535], the first that
    holds all values, or up to the largest. Raises UnreadableImage for values that are not finite.
    """
    if not np.isfinite(values).all():
        raise UnreadableImage("damaged: some pixels are no numbers")
    most = float(values.max())
    if values.dtype.kind == "f" and most <= MAX_FLOAT:
        peak = 1.0
    else:
        peak = next((bound for bound in (255.0, 65535.0) if most <= bound), most)
    scaled = values.astype(np.float32) * np.float32(255 / peak)
    return np.floor(scaled + 0.5).clip(0, 255).astype(np.uint8)


@lru_cache(maxsize=1)
def _srgb() -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


@lru_cache(maxsize=8)
def _to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The transform from a profile to sRGB for a mode; None where the profile does not fit."""
    try:
        source = ImageCms.getOpenProfile(BytesIO(profile))
        core: Any = source.profile  # Pillow's annotation is of another attribute
        if core.xcolor_space.strip() != SPACES[mode]:
            return None
        return ImageCms.buildTransform(source, _srgb(), mode, "RGB")
    except (OSError, ImageCms.PyCMSError):
        return None


def _applied(image: Image.Image, transform: ImageCms.ImageCmsTransform) -> Image.Image:
    converted = ImageCms.applyTransform(image, transform)
    assert converted is not None  # None is returned for conversions in place only
    return converted
