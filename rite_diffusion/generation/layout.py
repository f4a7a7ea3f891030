"""Boxes of a prompt's words in its picture, for regions that name a word instead of a box.

A word's cells are those where the prediction changes when the word is left out of the prompt, as
DiffEdit finds what to edit (Couairon et al. 2022, arXiv 2210.11427, Sec. 3.2), here while the
picture is drawn from noise. The word's cross-attention maps would not do: a text encoder may encode
a word at other tokens than its own, as the pocket base's does with a second noun.
"""

import math
from collections.abc import Sequence
from itertools import islice

import torch
from torch import Tensor
from torch.nn import functional as F

from rite_diffusion.backbones.protocols import Backbone
from rite_diffusion.errors import ConfigError
from rite_diffusion.generation.denoise import Predict, denoising
from rite_diffusion.generation.regions import word_pattern
from rite_diffusion.photos.cutout import otsu

EARLY = 0.5  # share of the steps that is drawn: the layout forms in the first ones
MARGIN = 0.02  # share of a word's total that its box leaves out on each side

Corners = tuple[float, float, float, float]  # left, top, right, bottom as fractions


def find_boxes(
    backbone: Backbone,
    predict: Predict,
    prompt: str,
    words: Sequence[str],
    *,
    seed: int,
    steps: int,
    width: int,
    height: int,
) -> list[Corners]:
    """A box for each word of the prompt, in the picture that `predict` draws.

    `width` and `height` are in pixels. ConfigError where leaving out a word changes nothing.
    """
    without = [" ".join(word_pattern(word).sub("", prompt, count=1).split()) for word in words]
    with torch.no_grad():
        conditioning = backbone.encode_prompts([prompt, *without])
    changes = []

    def predict_and_compare(latents: Tensor, timestep: Tensor) -> Tensor:
        count = 1 + len(words)
        each = latents.expand(count, -1, -1, -1)
        whole, *less = backbone.denoise(each, timestep.expand(count), conditioning).float()
        changes.append(torch.stack([(other - whole).abs().mean(0) for other in less]))
        return predict(latents, timestep)

    drawing = denoising(
        backbone, predict_and_compare, [seed], steps=steps, width=width, height=height
    )
    for _ in islice(drawing, math.ceil(EARLY * steps)):
        pass
    maps = torch.stack(changes).mean(0)
    for word, own in zip(words, maps, strict=True):
        if not own.max() > own.min():
            raise ConfigError(f"the picture of '{prompt}' is the same without '{word}'")
    return [box_of(own) for own in exclusive_maps(maps)]


def exclusive_maps(maps: Tensor) -> Tensor:
    """Maps (words, h, w) smoothed, divided by their means, and 0 where another's is larger."""
    maps = F.avg_pool2d(maps[None], 3, stride=1, padding=1, count_include_pad=False)[0]
    maps = maps / maps.mean((1, 2), keepdim=True)
    return maps * (maps == maps.amax(0))


def box_of(values: Tensor) -> Corners:
    """The box around the large values of a map (h, w), one cell wider on each side."""
    greys = (values / values.max() * 255).byte().cpu().numpy()
    large = values * torch.from_numpy(greys > otsu(greys)).to(values.device)
    top, bottom = _bounds(large.sum(1))
    left, right = _bounds(large.sum(0))
    return left, top, right, bottom


def _bounds(totals: Tensor) -> tuple[float, float]:
    """Bounds, as fractions, that hold all of the totals (n,) but MARGIN on each side."""
    shares = (totals.cumsum(0) / totals.sum()).tolist()
    first = next(place for place, share in enumerate(shares) if share > MARGIN)
    last = next(place for place, share in enumerate(shares) if share >= 1 - MARGIN)
    cells = len(shares)
    return round(max(first - 1, 0) / cells, 4), round(min(last + 2, cells) / cells, 4)
