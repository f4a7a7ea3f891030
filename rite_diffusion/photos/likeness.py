"""Near-duplicates among photos: the same picture in another size, compression or cut."""

from collections.abc import Sequence
from itertools import product

import numpy as np
from PIL import Image

from rite_diffusion.types import Photo

CELLS = 32  # on each side of the pictures that are compared
COARSE = 8  # cells on each side of the pictures of the first comparison
COARSE_COLOUR = 45.0  # mean difference of colours (of 255) above which two pictures are not alike
COARSE_LIKENESS = 0.5  # of the first comparison
MAX_CUTS = 60  # pairs whose cuts are compared, the likeliest first
ALIKE = 0.9  # correlation of the gradients of near-duplicates
COLOUR = 20.0  # mean difference of colours (of 255) that near-duplicates stay below
SCALES = (1.0, 0.975, 0.95, 0.925, 0.9)  # of cuts, as shares of width and of height
STEP = 0.025  # between the places of cuts
MAX_STRETCH = 0.06  # difference of the shares of width and of height


def near_duplicates(photos: Sequence[Photo]) -> list[list[str]]:
    """Groups of photos' names that are one picture, resized, recompressed or slightly cut.

    Two photos are alike where the gradients of their colours on 32 x 32 cells correlate by 0.9, for
    the whole pictures or for one and a cut of the other, and their colours differ little.
    Gradients show what is drawn where: plain grounds and their colours say nothing, so different
    drawings on white are not alike. Plain pictures of one colour are.
    """
    groups = {place: [place] for place in range(len(photos))}
    for number, (one, other) in enumerate(_candidates(photos)):
        if groups[one] is not groups[other] and _alike(photos[one], photos[other], number):
            groups[one] += groups[other]
            groups |= dict.fromkeys(groups[other], groups[one])
    found = sorted({id(group): sorted(group) for group in groups.values()}.values())
    return [[photos[place].path.name for place in group] for group in found if len(group) > 1]


def _candidates(photos: Sequence[Photo]) -> list[tuple[int, int]]:
    """Pairs of photos that may be alike, the likeliest first."""
    small = [_cells(Image.fromarray(photo.measures.thumbnail), COARSE) for photo in photos]
    if not small:
        return []
    gradients = np.stack([_gradients(each) for each in small])
    scores = np.triu(gradients @ gradients.T, 1)
    pairs = np.argwhere(scores >= COARSE_LIKENESS)
    order = np.argsort(-scores[tuple(pairs.T)], kind="stable")
    found = [(int(one), int(other)) for one, other in pairs[order]]
    return [
        (one, other)
        for one, other in found
        if np.abs(small[one] - small[other]).mean() < COARSE_COLOUR
    ]


def _alike(one: Photo, other: Photo, number: int) -> bool:
    """Whether two photos are one picture; `number` counts the pairs that were compared before."""
    pictures = [Image.fromarray(photo.measures.thumbnail) for photo in (one, other)]
    wholes = [_cells(each) for each in pictures]
    if _is_same(wholes[0], wholes[1]):
        return True
    if number >= MAX_CUTS:
        return False
    return _has_cut(pictures[0], wholes[1]) or _has_cut(pictures[1], wholes[0])


def _has_cut(picture: Image.Image, whole: np.ndarray) -> bool:
    """Whether the cells (32, 32, 3) are those of a cut of the picture."""
    cuts = [_cells(picture, box=box) for box in _boxes(picture.width)]
    likeness = np.stack([_gradients(each) for each in cuts]) @ _gradients(whole)
    return _is_same(cuts[int(likeness.argmax())], whole)


def _is_same(one: np.ndarray, other: np.ndarray) -> bool:
    likeness = _gradients(one) @ _gradients(other)
    return bool(likeness >= ALIKE and np.abs(one - other).mean() < COLOUR)


def _boxes(side: int) -> list[tuple[float, float, float, float]]:
    """The boxes of cuts at all places that are multiples of STEP: left, top, right, bottom."""
    spans = [
        (place * side, (place + scale) * side)
        for scale in SCALES
        for place in np.arange(0, 1 - scale + STEP / 2, STEP)
    ]
    return [
        (left, top, right, bottom)
        for (left, right), (top, bottom) in product(spans, spans)
        if abs((right - left) - (bottom - top)) <= MAX_STRETCH * side
    ]


def _cells(
    picture: Image.Image, side: int = CELLS, box: tuple[float, float, float, float] | None = None
) -> np.ndarray:
    return np.asarray(picture.resize((side, side), Image.Resampling.BILINEAR, box), np.float32)


def _gradients(cells: np.ndarray) -> np.ndarray:
    """Differences between neighbouring cells, in colour, as one vector of length 1.

    The last number is that of plain pictures, which have no differences.
    """
    across = (cells[:-1, 1:] - cells[:-1, :-1]).ravel()
    down = (cells[1:, :-1] - cells[:-1, :-1]).ravel()
    vector = np.concatenate([across, down])
    length = float(np.linalg.norm(vector))
    if length <= 1:
        return np.append(np.zeros_like(vector), np.float32(1))
    return np.append(vector / length, np.float32(0))
