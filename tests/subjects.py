"""Where a picture of one thing on one colour shows the thing."""

import numpy as np
from PIL import Image


def subject_of(image: Image.Image, contrast: int) -> np.ndarray:
    """Where (height, width) a picture is not of the colour of its upper and lower edge.

    `contrast` is the least sum of the three channels' differences, of 255 each.
    """
    pixels = np.asarray(image, int)
    ground = np.median(pixels[[0, -1]].reshape(-1, 3), axis=0)
    return np.abs(pixels - ground).sum(-1) > contrast
