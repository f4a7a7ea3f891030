"""Views of a photo: the photo, then random crops, colours and scales, with caption and mask.

A view is a function of (seed, photo, number), so views are encoded once, before training.
"""

from dataclasses import dataclass, replace

import torch
from PIL import Image, ImageEnhance, ImageOps

from rite_diffusion.config import AugmentSection
from rite_diffusion.photos.images import fit
from rite_diffusion.seeding import Stream, generator
from rite_diffusion.types import Photo

SCALES = (0.4, 1.4)  # range of the random scale (Kumari et al. 2023, Sec. 4)
SMALL, CLOSE = (0.6, ("very small", "far away")), (1.2, ("zoomed in", "close up"))


@dataclass(frozen=True)
class View:
    """A version of a photo, in the size that is trained on."""

    image: Image.Image
    caption: str
    mask: Image.Image | None  # mode L, white where the subject is; None: everywhere
    valid: Image.Image | None  # mode L, black outside the photo; None: the photo fills the view


def views_of(
    photo: Photo, size: tuple[int, int], augment: AugmentSection, seed: int, index: int
) -> list[View]:
    """The views of a photo in a size (width, height): itself, then `augment.views` - 1 random ones.

    With `augment.flip`, each is followed by its mirror image.
    """
    image, mask = photo.open()
    whole = View(image, photo.caption, mask, None)
    views = [_fitted(whole, size)]
    for number in range(1, augment.views):
        draws = generator(seed, index, number, Stream.VIEWS)
        view = _fitted(_cut(whole, augment.crop, draws), size)
        if augment.scale_and_prefix:
            view = _scaled(view, draws)
        views.append(_coloured(view, augment.colour, draws))
    if augment.flip:
        views = [each for view in views for each in (view, _mirrored(view))]
    return views


def _fitted(view: View, size: tuple[int, int]) -> View:
    """The view scaled to cover a size (width, height), then cropped to its centre."""
    return replace(view, image=fit(view.image, *size), mask=view.mask and fit(view.mask, *size))


def _uniform(low: float, high: float, draws: torch.Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=draws))


def _cut(view: View, most: float, draws: torch.Generator) -> View:
    """A random crop of the view, of the same shape and at least 1 - `most` of each side."""
    width, height = view.image.size
    kept = 1 - _uniform(0, most, draws)
    left, top = (_uniform(0, 1 - kept, draws) for _ in range(2))
    box = (
        round(left * width),
        round(top * height),
        round((left + kept) * width),
        round((top + kept) * height),
    )
    return replace(view, image=view.image.crop(box), mask=view.mask and view.mask.crop(box))


def _coloured(view: View, most: float, draws: torch.Generator) -> View:
    """The view with brightness, contrast and saturation changed by up to a share `most`."""
    image = view.image
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = enhance(image).enhance(_uniform(1 - most, 1 + most, draws))
    return View(image, view.caption, view.mask, view.valid)


def _scaled(view: View, draws: torch.Generator) -> View:
    """The view smaller on grey, or larger, with a caption that says so (Kumari et al. 2023).

    `valid` leaves the grey out of the loss.
    """
    scale = _uniform(*SCALES, draws)
    inner = (round(view.image.width * scale), round(view.image.height * scale))
    image = _placed(view.image, inner, "gray")
    mask = view.mask and _placed(view.mask, inner, "black")
    valid = _placed(Image.new("L", view.image.size, 255), inner, "black")
    return View(image, _with_scale_words(view.caption, scale, draws), mask, valid)


def _placed(image: Image.Image, inner: tuple[int, int], ground: str) -> Image.Image:
    """The image scaled to a size, centred in a frame of its original size."""
    scaled = image.resize(inner, Image.Resampling.LANCZOS)
    frame = Image.new(image.mode, image.size, ground)
    frame.paste(scaled, ((image.width - inner[0]) // 2, (image.height - inner[1]) // 2))
    return frame


def _with_scale_words(caption: str, scale: float, draws: torch.Generator) -> str:
    if SMALL[0] <= scale <= CLOSE[0]:
        return caption
    words = (SMALL if scale < SMALL[0] else CLOSE)[1]
    return f"{caption}, {words[int(torch.randint(2, (), generator=draws))]}"


def _mirrored(view: View) -> View:
    mask, valid = (each and ImageOps.mirror(each) for each in (view.mask, view.valid))
    return View(ImageOps.mirror(view.image), view.caption, mask, valid)
