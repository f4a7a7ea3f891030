"""Selection of rows whose gradients are summed in a fixed order, for repeatable training.

The gradient of `values[places]` sums the rows of repeated places with atomic operations, in the
order in which threads arrive (PyTorch's index_put with accumulate on a CPU). Floating-point sums
depend on the order. A learned embedding or a caption occurs in many rows of a batch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def rows_of(values: Tensor, places: Sequence[int]) -> Tensor:
    """`values[places]` along the first dimension; places may repeat."""
    rows = values.unbind(0)
    return torch.stack([rows[place] for place in places]) if places else values[:0]
