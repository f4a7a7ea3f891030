"""Masks with sharp outlines from rough maps of the subject."""

import numpy as np
from PIL import Image

SIDE = 64  # pixels of the small picture whose colours are compared
ROUNDS = 20
MAP_WEIGHT = 0.5  # logits per unit of a map's score above the threshold
BORDER_PENALTY = 4.0  # logits subtracted from the outermost pixels
BANDWIDTH = 20.0  # grey levels: standard deviation of the density kernel
FLOOR = 1e-6  # added to densities


def cut_out(scores: np.ndarray, photo: Image.Image) -> Image.Image:
    """The mask of a photo, white where its subject is, from scores (h, w) in [0, 1].

    The pixels of a small copy are divided into subject and background by colour. Two steps
    alternate: the colour densities of both are estimated from the pixels' probabilities, and the
    probabilities from the densities, the scores, and a prior against pixels at the border. This is
    GrabCut (Rother et al. 2004, Section 3) with probabilities and kernel densities; the prior is of
    Wei et al. (2012, Section 2).
    """
    small = photo.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX)
    likely = _likelihood(_resized(scores, (SIDE, SIDE)), np.asarray(small, np.float32))
    mask = np.where(_resized(likely, photo.size) > 0.5, 255, 0)
    return Image.fromarray(mask.astype(np.uint8))


def _likelihood(scores: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """Probability (SIDE, SIDE) that each of the pixels (SIDE, SIDE, 3) is of the subject."""
    threshold = otsu((scores.clip(0, 1) * 255).astype(np.uint8)) / 255
    prior = MAP_WEIGHT * (scores.clip(0, 1) - threshold)
    prior[[0, 1, -2, -1]] -= BORDER_PENALTY
    prior[2:-2, [0, 1, -2, -1]] -= BORDER_PENALTY
    colours = pixels.reshape(-1, 3)
    squares = (colours**2).sum(1)
    distances = squares[:, None] + squares - 2 * colours @ colours.T
    kernel = np.exp(-distances / (2 * BANDWIDTH**2))
    likely = _sigmoid(2 * prior)
    for _ in range(ROUNDS):
        subject = likely.reshape(-1)
        ground = 1 - subject
        inside, outside = kernel @ subject / subject.sum(), kernel @ ground / ground.sum()
        evidence = np.log((inside + FLOOR) / (outside + FLOOR)).reshape(prior.shape)
        likely = _sigmoid(prior + evidence)
    return likely


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logits.clip(-30, 30)))


def _resized(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Values (h, w) resized to (width, height), bicubic."""
    image = Image.fromarray(values.astype(np.float32))
    return np.asarray(image.resize(size, Image.Resampling.BICUBIC), np.float32)


def otsu(greys: np.ndarray) -> int:
    """The threshold, 0 to 255, with the largest between-class variance (Otsu 1979, Eq. 18)."""
    counts = np.bincount(greys.ravel(), minlength=256).astype(float)
    weights = counts.cumsum() / counts.sum()  # of the lower class
    means = (counts * np.arange(256)).cumsum() / counts.sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        between = (means[-1] * weights - means) ** 2 / (weights * (1 - weights))
    return int(np.nan_to_num(between, posinf=0.0).argmax())
