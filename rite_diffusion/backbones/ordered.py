"""Rows of a tensor, whose gradients add up in one order whatever the number of threads.

The gradient of `values[places]` adds up the rows of equal places by atomic operations, in the order
in which threads happen to come (PyTorch's index_put with accumulate on a CPU); floating-point sums
differ with the order. A learned word or a caption stands in many rows of a batch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def rows_of(values: Tensor, places: Sequence[int]) -> Tensor:
    """`values[places]` along the first dimension; places may repeat."""
    rows = values.unbind(0)
    return torch.stack([rows[place] for place in places]) if places else values[:0]
