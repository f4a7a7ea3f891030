"""Second moments of a layer's inputs, exact or as a sketch, and the algebra that fusion needs.

With G = E[x x^T] (inputs, inputs), E|D x|^2 = tr(D G D^T) for any update D.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class SecondMoment:
    """G = basis^T diag(values) basis + tail I; exact where `basis` has all directions."""

    basis: Tensor  # (k, inputs), orthonormal rows
    values: Tensor  # (k,) descending: eigenvalues minus the tail
    tail: float
    rows: int  # number of inputs

    @property
    def spectral(self) -> SecondMoment:
        """Itself."""
        return self

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

    def matrix(self) -> Tensor:
        """G (inputs, inputs)."""
        matrix = self.root().mT @ self.root()
        matrix.diagonal().add_(self.tail)
        return matrix

    def times(self, rows: Tensor) -> Tensor:
        """Rows (n, inputs) times G."""
        return (rows @ self.basis.mT * self.values) @ self.basis + self.tail * rows

    def power(self, rows: Tensor, exponent: float, ridge: float) -> Tensor:
        """Rows (n, inputs) times (G + ridge I)^exponent."""
        low = self.tail + ridge
        change = (self.values + low) ** exponent - low**exponent
        return (rows @ self.basis.mT * change) @ self.basis + low**exponent * rows


@dataclass(frozen=True, eq=False)
class FullSecondMoment:
    """G as a matrix; its eigenvectors are computed when they are first used.

    The upper triangle is stored in single precision: a large model has about a hundred matrices per
    concept. Sums are in float64, and one rounding is far below any ridge.
    """

    upper: Tensor  # (inputs * (inputs + 1) / 2,) the upper triangle, row by row
    width: int  # length of an input
    rows: int

    @cached_property
    def spectral(self) -> SecondMoment:
        """The same by its eigendecomposition."""
        values, vectors = torch.linalg.eigh(self.matrix())
        return from_eigen(vectors.mT.flip(0), values.flip(0).clamp(min=0), 0.0, self.rows)

    @property
    def trace(self) -> float:
        """E|x|^2."""
        return self.matrix().trace().item()

    def matrix(self) -> Tensor:
        """G (inputs, inputs) in float64."""
        full = torch.zeros(self.width, self.width, dtype=torch.float64)
        rows, columns = torch.triu_indices(self.width, self.width)
        full[rows, columns] = self.upper.double()
        full[columns, rows] = self.upper.double()
        return full

    def times(self, rows: Tensor) -> Tensor:
        """Rows (n, inputs) times G."""
        return rows @ self.matrix()


def full_second_moment(moments: Tensor, rows: int) -> FullSecondMoment:
    """The FullSecondMoment of a symmetric matrix (inputs, inputs)."""
    width = len(moments)
    upper = moments[tuple(torch.triu_indices(width, width))]
    return FullSecondMoment(upper.float(), width, rows)


AnySecondMoment = SecondMoment | FullSecondMoment


def from_eigen(
    basis: Tensor, values: Tensor, rest: float, rows: int, keep: int | None = None
) -> SecondMoment:
    """A SecondMoment of leading eigenvectors (k, inputs) and values; the others sum to `rest`.

    At most `keep` are kept. The tail is the mean of all others, so the trace does not change.
    """
    width, most = basis.shape[1], len(values) if keep is None else min(keep, len(values))
    beyond = values.sum() + rest - values.cumsum(0)  # sum of the others after k + 1 directions
    others = (width - torch.arange(1, len(values) + 1)).clamp(min=1)
    tails = (beyond / others).clamp(min=0)
    above = (values > tails + 1e-12 * values[0])[:most]  # other directions belong to the tail
    count = max(int(above.long().cumprod(0).sum()), 1)
    tail = tails[count - 1].item() if count < width else 0.0
    return SecondMoment(basis[:count], values[:count] - tail, tail, rows)


def truncated(moment: AnySecondMoment, keep: int) -> SecondMoment:
    """The second moment with at most `keep` directions and the rest as tail."""
    whole = moment.spectral
    outside = whole.width - len(whole.values)
    rest = outside * whole.tail
    return from_eigen(whole.basis, whole.values + whole.tail, rest, whole.rows, keep)


def mean(moments: Sequence[AnySecondMoment]) -> AnySecondMoment:
    """The mean of second moments; equal ones, such as several of one base, are not summed."""
    first, rows = moments[0], sum(moment.rows for moment in moments)
    if all(_same(moment, first) for moment in moments[1:]):
        return first
    if any(isinstance(moment, FullSecondMoment) for moment in moments):
        return full_second_moment(
            torch.stack([moment.matrix() for moment in moments]).mean(0), rows
        )
    roots = torch.cat([moment.spectral.root() for moment in moments]) / len(moments) ** 0.5
    _, singular, basis = torch.linalg.svd(roots, full_matrices=False)
    tail = sum(moment.spectral.tail for moment in moments) / len(moments)
    return SecondMoment(basis, singular.square(), tail, rows)


def _same(one: AnySecondMoment, other: AnySecondMoment) -> bool:
    if one is other:
        return True
    both = isinstance(one, SecondMoment) and isinstance(other, SecondMoment)
    return both and torch.equal(one.spectral.basis, other.spectral.basis)


class SecondMomentSum:
    """S = sum_i weight_i G_i + ridge * (mean eigenvalue of the sum) * I.

    Stored as a matrix (inputs, inputs), or as roots R with S = R^T R + tail I where the second
    moments have few directions in total.
    """

    def __init__(self, moments: Sequence[AnySecondMoment], weights: Sequence[float], ridge: float):
        pairs = list(zip(moments, weights, strict=True))
        width = moments[0].width
        floor = ridge * sum(weight * moment.trace for moment, weight in pairs) / width
        few = [moment for moment in moments if isinstance(moment, SecondMoment)]
        self.low_rank = len(few) == len(moments) and sum(len(g.values) for g in few) < width // 2
        if self.low_rank:
            self.roots = torch.cat(
                [weight**0.5 * moment.spectral.root() for moment, weight in pairs]
            )
            self.tail = floor + sum(weight * moment.spectral.tail for moment, weight in pairs)
        else:
            self.matrix = sum(
                (weight * moment.matrix() for moment, weight in pairs), torch.zeros(())
            )
            self.matrix.diagonal().add_(floor)

    def times(self, rows: Tensor) -> Tensor:
        """Rows (n, inputs) times S."""
        if self.low_rank:
            return rows @ self.roots.mT @ self.roots + self.tail * rows
        return rows @ self.matrix

    def solve(self, rows: Tensor) -> Tensor:
        """Rows (n, inputs) times S^-1, by Cholesky factorisation.

        With roots, by the Woodbury identity S^-1 = (I - R^T (tail I + R R^T)^-1 R) / tail.
        """
        if not self.low_rank:
            return torch.cholesky_solve(rows.mT, torch.linalg.cholesky(self.matrix)).mT
        inner = self.roots @ self.roots.mT
        inner.diagonal().add_(self.tail)
        projected = torch.cholesky_solve(self.roots @ rows.mT, torch.linalg.cholesky(inner))
        return (rows - projected.mT @ self.roots) / self.tail
