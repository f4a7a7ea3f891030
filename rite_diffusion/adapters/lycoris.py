"""LyCORIS's LoHa and LoKr (Yeh et al. 2024) as LoRA factors, exactly.

The Hadamard or Kronecker product of low-rank matrices is a low-rank matrix whose factors follow
from theirs, so no SVD is needed and nothing is lost.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rite_diffusion.types import ProductUpdate

LARGEST = 2**28  # numbers in a weight; Stable Diffusion's largest layer has 2**25

Parts = Mapping[str, Tensor]


@dataclass(frozen=True)
class Product:
    """An update left @ right of a weight (out, in, *kernel).

    `left` is (out, r), `right` (r, in * k * k); `kernel` is () where the file does not state it.
    """

    left: Tensor
    right: Tensor
    kernel: tuple[int, ...] = ()

    def down(self) -> Tensor:
        """`right` as LoRA's down: (r, in) or (r, in, k, k)."""
        return self.right.unflatten(1, (-1, *self.kernel)) if self.kernel else self.right

    def up(self) -> Tensor:
        """`left` as LoRA's up: (out, r) or (out, r, 1, 1)."""
        return self.left[:, :, None, None] if self.kernel else self.left


def whole(weight: Tensor) -> Product:
    """A dense update (out, in) or (out, in, k, k) as a product with the identity."""
    matrix = weight.float().flatten(1)
    identity = torch.eye(min(matrix.shape))
    wide = matrix.shape[0] <= matrix.shape[1]
    left, right = (identity, matrix) if wide else (matrix, identity)
    return Product(left, right, tuple(weight.shape[2:]))


def loha(parts: Parts) -> Product:
    """(A1 B1) * (A2 B2), elementwise; columns of A1 and A2, rows of B1 and B2 multiply pairwise.

    Raises KeyError where a factor is missing, ValueError where they do not fit.
    """
    one, two = (_factor(parts, f"hada_w{half}", f"hada_t{half}") for half in ("1", "2"))
    if (one.kernel, len(one.left), one.right.shape[1]) != (
        two.kernel, len(two.left), two.right.shape[1]
    ):  # fmt: skip
        raise ValueError("its two products differ in shape")
    if _is_full(one, two, len(one.left), one.right.shape[1]):
        return _as_whole((one.left @ one.right) * (two.left @ two.right), one.kernel)
    left = one.left[:, :, None] * two.left[:, None, :]  # (out, r1, r2)
    right = one.right[:, None] * two.right[None]  # (r1, r2, inputs)
    return Product(left.flatten(1), right.flatten(0, 1), one.kernel)


def lokr(parts: Parts) -> Product:
    """The Kronecker product W1 (x) W2; only W2 may have a kernel.

    (L1 R1) (x) (L2 R2) = (L1 (x) L2) (R1 (x) R2). Raises as `loha` does.
    """
    one, two = _factor(parts, "lokr_w1"), _factor(parts, "lokr_w2", "lokr_t2")
    if one.kernel:
        raise ValueError("its first factor has a kernel")
    out, inputs = len(one.left) * len(two.left), one.right.shape[1] * two.right.shape[1]
    if _is_full(one, two, out, inputs):
        return _as_whole(_kron(one.left @ one.right, two.left @ two.right), two.kernel)
    left, right = _kron(one.left, two.left), _kron(one.right, two.right)
    return Product(left, right, two.kernel)


def _kron(one: Tensor, two: Tensor) -> Tensor:
    """The Kronecker product of matrices; `torch.kron` needs them contiguous."""
    product = one[:, None, :, None] * two[None, :, None, :]
    return product.flatten(2).flatten(0, 1)


def _is_full(one: Product, two: Product, out: int, inputs: int) -> bool:
    """Whether the product of the two ranks is at least the full rank of the weight."""
    if out * inputs > LARGEST:
        raise ValueError(f"it would be a weight of {out} x {inputs}")
    return len(one.right) * len(two.right) >= min(out, inputs)


def _as_whole(matrix: Tensor, kernel: tuple[int, ...]) -> Product:
    full = whole(matrix)
    return Product(full.left, full.right, kernel)


def _factor(parts: Parts, start: str, core: str = "") -> Product:
    """One of the two matrices: stored whole, as two factors, or as two factors and a core.

    A core (p, q, k, k), for a convolution, has factors (p, out) and (q, in).
    """
    if start in parts:
        weight = parts[start]
        if {f"{start}_a", f"{start}_b", core} & parts.keys():
            raise ValueError(f"{start} is stored both whole and as factors")
        if weight.ndim not in (2, 4):
            raise ValueError(f"{start} is {tuple(weight.shape)}")
        return whole(weight)
    a, b = parts[f"{start}_a"].float(), parts[f"{start}_b"].float()
    if a.ndim != 2 or b.ndim != 2:
        raise ValueError(f"{start} is {tuple(a.shape)}, {tuple(b.shape)}")
    if core in parts:
        middle = parts[core].float()
        if middle.ndim != 4 or middle.shape[:2] != (len(a), len(b)):
            raise ValueError(f"{core} is {tuple(middle.shape)}")
        right = torch.einsum("pqkl,qi->pikl", middle, b).flatten(1)
        return Product(a.mT, right, tuple(middle.shape[2:]))
    if a.shape[1] != len(b):
        raise ValueError(f"{start} is {tuple(a.shape)}, {tuple(b.shape)}")
    return Product(a, b)


def tensors_of(stem: str, update: ProductUpdate) -> dict[str, Tensor]:
    """The tensors of an update in a file, with its alpha, under the stem of its module."""
    rank = factor_rank(update.parts)
    alpha = {} if rank is None else {"alpha": torch.tensor(update.scale * rank)}
    return {f"{stem}.{key}": value for key, value in {**update.parts, **alpha}.items()}


def at_scale_one(update: ProductUpdate) -> ProductUpdate:
    """The update with its scale multiplied into its first matrix."""
    first = next(iter(update.parts))
    parts = {**update.parts, first: update.parts[first] * update.scale}
    return ProductUpdate(update.name, parts, 1.0)


def header_of(updates: Sequence[ProductUpdate]) -> dict[str, str]:
    """The header entries that tell a file of LyCORIS's; none without updates."""
    if not updates:
        return {}
    algorithm = "loha" if "hada_w1_a" in updates[0].parts else "lokr"
    ranks = {str(factor_rank(update.parts)) for update in updates} - {"None"}
    return {
        "ss_network_module": "lycoris.kohya",
        "ss_network_args": json.dumps({"algo": algorithm}),
        "ss_network_dim": ranks.pop() if len(ranks) == 1 else "Dynamic",
    }


def factor_rank(parts: Parts) -> int | None:
    """The rank that alpha is divided by; None where both matrices of a LoKr are whole."""
    for key in ("lokr_w2_b", "lokr_w1_b", "hada_w1_b"):
        if key in parts:
            return parts[key].shape[0]
    return None
