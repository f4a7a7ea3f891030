"""From a rough map of where the subject is to a mask that follows its outline."""

import numpy as np
from PIL import Image

SIDE = 64  # pixels of the small picture whose colours are compared
ROUNDS = 20
TRUST = 0.5  # logits between the map's surest cell and one at the parting, at most
BORDER = 4.0  # logits taken from the outermost pixels
SPREAD = 20.0  # grey levels: standard deviation of the colours' kernel
FLOOR = 1e-6  # of a density


def cut_out(scores: np.ndarray, photo: Image.Image) -> Image.Image:
    """The mask of a photo, white where its subject is, from scores (h, w) in [0, 1].

    A small copy's pixels are parted by their colours: in turn, each side's colour density is
    estimated from the pixels that are likely on it, and each pixel's likelihood from the densities,
    the scores and the border, which subjects touch less than grounds do. The alternation is
    GrabCut's (Rother et al. 2004, Section 3) with soft sides and kernel densities; the border is
    Wei et al.'s prior (2012, Section 2).
    """
    small = photo.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX)
    likely = _likelihood(_resized(scores, (SIDE, SIDE)), np.asarray(small, np.float32))
    mask = np.where(_resized(likely, photo.size) > 0.5, 255, 0)
    return Image.fromarray(mask.astype(np.uint8))


def _likelihood(scores: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """How likely (SIDE, SIDE) each of the pixels (SIDE, SIDE, 3) is the subject's."""
    parting = otsu((scores.clip(0, 1) * 255).astype(np.uint8)) / 255
    prior = TRUST * (scores.clip(0, 1) - parting)
    prior[[0, 1, -2, -1]] -= BORDER
    prior[2:-2, [0, 1, -2, -1]] -= BORDER
    colours = pixels.reshape(-1, 3)
    squares = (colours**2).sum(1)
    distances = squares[:, None] + squares - 2 * colours @ colours.T
    kernel = np.exp(-distances / (2 * SPREAD**2))
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
    """Values (h, w) at another (width, height), smoothly."""
    image = Image.fromarray(values.astype(np.float32))
    return np.asarray(image.resize(size, Image.Resampling.BICUBIC), np.float32)


def otsu(greys: np.ndarray) -> int:
    """The grey that parts a picture into two classes farthest apart (Otsu 1979, Eq. 18)."""
    counts = np.bincount(greys.ravel(), minlength=256).astype(float)
    weights = counts.cumsum() / counts.sum()  # of the lower class
    means = (counts * np.arange(256)).cumsum() / counts.sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        between = (means[-1] * weights - means) ** 2 / (weights * (1 - weights))
    return int(np.nan_to_num(between, posinf=0.0).argmax())
