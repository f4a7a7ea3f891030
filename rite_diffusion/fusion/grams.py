"""Second moments of a layer's inputs, exact or as a sketch, and what fusion does with them.

G = E[x x^T] (inputs, inputs) stands for all the inputs x that a layer has seen: for any update D,
E|D x|^2 = tr(D G D^T).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rite_diffusion.fusion.layer import Factors


@dataclass(frozen=True)
class Gram:
    """G = basis^T diag(values) basis + tail I; exact where `basis` has all directions."""

    basis: Tensor  # (k, inputs), orthonormal rows
    values: Tensor  # (k,) descending: what each direction has beyond the tail
    tail: float
    rows: int  # how many inputs were seen

    @property
    def width(self) -> int:
        """Length of an input."""
        return self.basis.shape[1]

    @property
    def trace(self) -> float:
        """E|x|^2."""
        return self.values.sum().item() + self.tail * self.width

    def root(self) -> Tensor:
        """R (k, inputs) with G = R^T R + tail I."""
        return self.values.sqrt()[:, None] * self.basis

    def times(self, rows: Tensor) -> Tensor:
        """Rows (n, inputs) times G."""
        return (rows @ self.basis.mT * self.values) @ self.basis + self.tail * rows

    def power(self, rows: Tensor, exponent: float, ridge: float) -> Tensor:
        """Rows (n, inputs) times (G + ridge I)^exponent."""
        low = self.tail + ridge
        change = (self.values + low) ** exponent - low**exponent
        return (rows @ self.basis.mT * change) @ self.basis + low**exponent * rows


def from_matrix(matrix: Tensor, rows: int) -> Gram:
    """The Gram that is a symmetric matrix (inputs, inputs)."""
    values, vectors = torch.linalg.eigh(matrix)
    return from_eigen(vectors.mT.flip(0), values.flip(0).clamp(min=0), 0.0, rows)


def from_eigen(
    basis: Tensor, values: Tensor, rest: float, rows: int, keep: int | None = None
) -> Gram:
    """The Gram of leading eigenvectors (k, inputs) and values, where the others sum to `rest`.

    `keep` of them are kept; the tail is the mean of all others, so the trace stays.
    """
    width, most = basis.shape[1], len(values) if keep is None else min(keep, len(values))
    beyond = values.sum() + rest - values.cumsum(0)  # what is left after k + 1 directions
    others = (width - torch.arange(1, len(values) + 1)).clamp(min=1)
    tails = (beyond / others).clamp(min=0)
    loud = (values > tails + 1e-12 * values[0])[:most]  # below the tail, a direction joins it
    count = max(int(loud.long().cumprod(0).sum()), 1)
    tail = tails[count - 1].item() if count < width else 0.0
    return Gram(basis[:count], values[:count] - tail, tail, rows)


def truncated(gram: Gram, keep: int) -> Gram:
    """The same Gram with at most `keep` directions; the rest goes into the tail."""
    outside = gram.width - len(gram.values)
    return from_eigen(gram.basis, gram.values + gram.tail, outside * gram.tail, gram.rows, keep)


def mean(grams: Sequence[Gram]) -> Gram:
    """The mean of Grams; equal ones, as of one base, are not summed again."""
    if all(torch.equal(gram.basis, grams[0].basis) for gram in grams[1:]):
        return grams[0]
    roots = torch.cat([gram.root() for gram in grams]) / len(grams) ** 0.5
    _, singular, basis = torch.linalg.svd(roots, full_matrices=False)
    tail = sum(gram.tail for gram in grams) / len(grams)
    return Gram(basis, singular.square(), tail, sum(gram.rows for gram in grams))


class GramSum:
    """S = sum_i weight_i G_i + ridge * (mean eigenvalue of the sum) * I."""

    def __init__(self, grams: Sequence[Gram], weights: Sequence[float], ridge: float):
        pairs = list(zip(grams, weights, strict=True))
        width = grams[0].width
        self.roots = torch.cat([weight**0.5 * gram.root() for gram, weight in pairs])
        trace = sum(weight * gram.trace for gram, weight in pairs)
        self.tail = sum(weight * gram.tail for gram, weight in pairs) + ridge * trace / width

    def times(self, rows: Tensor) -> Tensor:
        """Rows (n, inputs) times S."""
        return rows @ self.roots.mT @ self.roots + self.tail * rows

    def solve(self, rows: Tensor) -> Tensor:
        """Rows (n, inputs) times S^-1, by Cholesky.

        With fewer directions than inputs by the Woodbury identity
        S^-1 = (I - R^T (tail I + R R^T)^-1 R) / tail, so that no inputs x inputs matrix is made.
        """
        count, width = self.roots.shape
        if count < width // 2:
            inner = self.roots @ self.roots.mT
            inner.diagonal().add_(self.tail)
            projected = torch.cholesky_solve(self.roots @ rows.mT, torch.linalg.cholesky(inner))
            return (rows - projected.mT @ self.roots) / self.tail
        matrix = self.roots.mT @ self.roots
        matrix.diagonal().add_(self.tail)
        return torch.cholesky_solve(rows.mT, torch.linalg.cholesky(matrix)).mT


def output_energy(factors: Factors, gram: Gram) -> float:
    """E|D x|^2 of an update D = up @ down over the inputs of a Gram: tr(D G D^T)."""
    inner = gram.times(factors.down) @ factors.down.mT  # (r, r)
    return ((factors.up.mT @ factors.up) * inner).sum().clamp(min=0).item()
