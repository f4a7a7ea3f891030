"""Grounds, subjects and overlays of photos, as far as small copies show them."""

from collections.abc import Sequence

import numpy as np

from rite_diffusion.types import Photo

RING = 4  # cells of the thumbnail on each side that count as ground
SAME_GROUND = 10.0  # difference of the colours of two rings (of 255) up to which grounds are one
PLAIN_SPREAD = 20.0  # of a plain ring's colours (of 255), as the 90th percentile from a plane
FIGURE = 30.0  # difference of a cell's colours from that plane that makes it the subject's
TRIM = (2, 98)  # percentiles of the subject's cells that its box reaches to, on each axis
OVERLAY_ZONE = 0.22  # of the side: an overlay lies in this zone along the edges
OVERLAY_EDGE = 5.0  # grey levels of an overlay's edges, in the median of the photos
OVERLAY_AGREEMENT = 0.9  # of the directions of an edge over the photos
OVERLAY_WINDOW = (6, 20)  # cells in which an overlay's edges are counted, lying or standing
OVERLAY_SHARE = 0.23  # of a window's cells that have such edges where there is an overlay
OVERLAY_PHOTOS = 5  # photos at least: in fewer, edges agree by chance


def ring_of(thumbnail: np.ndarray) -> np.ndarray:
    """The values of a thumbnail's outer cells, in rows: colours (n, 3) of (48, 48, 3)."""
    inner = np.zeros(thumbnail.shape[:2], bool)
    inner[RING:-RING, RING:-RING] = True
    return thumbnail[~inner].astype(np.float32)


def ground_difference(one: np.ndarray, other: np.ndarray) -> float:
    """How much the colours of two rings differ (of 255), wherever each colour is.

    The mean over three axes, grey and two opponents, of the 1-Wasserstein distance.
    """
    axes = np.sort(_opponents(one), axis=0), np.sort(_opponents(other), axis=0)
    return float(np.abs(axes[0] - axes[1]).mean(0).sum())


def _opponents(colours: np.ndarray) -> np.ndarray:
    red, green, blue = colours.T
    return np.stack([(red + green + blue) / 3, red - green, (red + green) / 2 - blue], 1)


def one_ground(photos: Sequence[Photo]) -> bool:
    """Whether all photos have the same ground, each compared with that in the middle."""
    rings = [ring_of(photo.measures.thumbnail) for photo in photos]
    far = np.array([[ground_difference(one, other) for other in rings] for one in rings])
    return bool(far.max(1).min() <= SAME_GROUND)


def subject_share(photo: Photo) -> float | None:
    """The share of the picture that the subject takes, in [0, 1]; None where that is not known.

    That of the mask, where there is one. Else it is measured on plain grounds alone: the box that
    holds the cells whose colours are far from the plane that fits those along the borders.
    """
    if photo.white is not None:
        return photo.white
    thumbnail = photo.measures.thumbnail.astype(np.float32)
    difference = np.abs(thumbnail - _plane_of_ring(thumbnail)).max(2)
    if np.percentile(ring_of(difference), 90) > PLAIN_SPREAD:
        return None
    rows, columns = np.nonzero(difference > FIGURE)
    if not len(rows):
        return None
    sides = [np.ptp(np.percentile(axis, TRIM)) + 1 for axis in (rows, columns)]
    return float(np.prod(sides) / difference.size)


def _plane_of_ring(thumbnail: np.ndarray) -> np.ndarray:
    """The colours (h, w, 3), linear in row and column, that fit the ring: a plain ground's."""
    rows, columns = np.indices(thumbnail.shape[:2]).astype(np.float32)
    places = np.stack([np.ones_like(rows), rows, columns], 2)
    coefficients, *_ = np.linalg.lstsq(ring_of(places), ring_of(thumbnail), rcond=None)
    return places @ coefficients


def has_overlay(photos: Sequence[Photo]) -> bool:
    """Whether the photos have the same edges in one place near their borders, as of a watermark.

    In the grey thumbnails an edge counts where it is there in most photos and runs the same way in
    all; it is an overlay where such edges are dense.
    """
    greys = np.stack([photo.measures.grey for photo in photos]).astype(np.float32)
    across = greys[:, :-1, 1:] - greys[:, :-1, :-1]
    down = greys[:, 1:, :-1] - greys[:, :-1, :-1]
    strength = np.hypot(across, down)
    directions = (across + 1j * down) / np.maximum(strength, 1e-6)
    agree = np.abs(directions.mean(0)) > OVERLAY_AGREEMENT
    edges = (agree & (np.median(strength, 0) > OVERLAY_EDGE)).astype(np.int64)
    depth = round(OVERLAY_ZONE * len(edges))
    edges[depth:-depth, depth:-depth] = 0
    sums = np.pad(edges.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    most = max(_densest(sums, *OVERLAY_WINDOW), _densest(sums.T, *OVERLAY_WINDOW))
    return most >= OVERLAY_SHARE * OVERLAY_WINDOW[0] * OVERLAY_WINDOW[1]


def _densest(sums: np.ndarray, height: int, width: int) -> int:
    """The largest sum of a window, from a table of cumulative sums."""
    windows = sums[height:, width:] - sums[:-height, width:]
    return int((windows - sums[height:, :-width] + sums[:-height, :-width]).max())
