"""Fingerprints of base models, equal or close whatever the precision of the weights."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

BITS = 64


def fingerprint(weights: Sequence[Tensor]) -> str:
    """16 hex digits: the signs of 64 random projections of the weights (Charikar 2002, Sec. 3).

    The expected share of bits in which two models differ is the angle between their weights divided
    by pi: about half for unrelated models, few for fine-tuned ones, and almost none for the same
    weights in another precision.
    """
    flat = torch.cat([weight.detach().cpu().double().flatten() for weight in weights]).numpy()
    projections = np.random.RandomState(0).standard_normal((BITS, len(flat)))
    bits = "".join("1" if value > 0 else "0" for value in projections @ flat)
    return f"{int(bits, 2):0{BITS // 4}x}"
