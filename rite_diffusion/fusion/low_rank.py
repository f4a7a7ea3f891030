"""Low-rank approximations of updates, computed from their factors without the dense matrix."""

import torch
from torch import Tensor

from rite_diffusion.fusion.layer import Factors, Layer
from rite_diffusion.fusion.settings import FusionSettings


def spectrum(factors: Factors) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD (left, values, right) of up @ down, through QR of both and an r x r SVD."""
    basis_up, core_up = torch.linalg.qr(factors.up)
    basis_down, core_down = torch.linalg.qr(factors.down.mT)
    left, values, right = torch.linalg.svd(core_up @ core_down.mT, full_matrices=False)
    return basis_up @ left, values, right @ basis_down.mT


def _cut(left: Tensor, values: Tensor, right: Tensor, rank: int) -> Factors:
    root = values[:rank].sqrt()
    return Factors(left[:, :rank] * root, root[:, None] * right[:rank])


def to_rank(factors: Factors, rank: int) -> Factors:
    """The nearest update of at most `rank` (Eckart & Young 1936)."""
    return _cut(*spectrum(factors), rank) if rank < factors.rank else factors


def to_error(factors: Factors, error: float) -> Factors:
    """The update of smallest rank, at least 1, with a relative Frobenius error up to `error`."""
    left, values, right = spectrum(factors)
    lost = values.square().flip(0).cumsum(0).flip(0)  # lost[k]: squared error at rank k
    rank = int((lost > error**2 * lost[:1]).sum())
    return _cut(left, values, right, max(rank, 1))


def to_true_rank(factors: Factors) -> Factors:
    """The same update at its numerical rank, at least 1."""
    left, values, right = spectrum(factors)
    zero = 1e-13 * factors.up.norm() * factors.down.norm()
    return _cut(left, values, right, max(int((values > zero).sum()), 1))


def to_rank_on_inputs(factors: Factors, covariance: Tensor, rank: int) -> Factors:
    """The update of at most `rank` with the least output error on inputs of second moment S.

    It minimises |(W - up down) S^1/2|_F. The truncated SVD of W S^1/2 is its projection on the
    leading left singular vectors P, and P P^T W S^1/2 = (P P^T W) S^1/2, so neither S^1/2 nor its
    inverse is needed. `covariance` is down S down^T (r, r).
    """
    if rank >= factors.rank:
        return factors
    basis, core = torch.linalg.qr(factors.up)
    moments = core @ covariance @ core.mT
    leading = torch.linalg.eigh((moments + moments.mT) / 2).eigenvectors[:, -rank:]
    return Factors(basis @ leading, (leading.mT @ core) @ factors.down)


def factorised(matrix: Tensor, rank: int) -> Factors:
    """The nearest update of at most `rank` to a dense one (out, inputs)."""
    if matrix.shape[0] > matrix.shape[1]:
        transposed = factorised(matrix.mT, rank)
        return Factors(transposed.down.mT, transposed.up.mT)
    leading = torch.linalg.eigh(matrix @ matrix.mT).eigenvectors[:, -rank:]
    return Factors(leading, leading.mT @ matrix)


def as_factors(matrix: Tensor) -> Factors:
    """A dense update (out, inputs) as a product with the identity, exactly."""
    out, inputs = matrix.shape
    identity = torch.eye(min(out, inputs), dtype=matrix.dtype)
    return Factors(identity, matrix) if out <= inputs else Factors(matrix, identity)


def cut_to_rank(layer: Layer, fused: Factors, settings: FusionSettings) -> Factors:
    """The nearest update of at most `settings.rank`; unchanged where that is not set."""
    return fused if settings.rank is None else to_rank(fused, settings.rank)


def cut_dense(layer: Layer, fused: Factors, settings: FusionSettings) -> Factors:
    """The nearest update of at most `settings.rank`, by default the sum of the parts' ranks."""
    rank = settings.rank or layer.rank
    return factorised(fused.dense(), rank) if rank < fused.rank else fused


def squared_norm(factors: Factors) -> float:
    """The squared Frobenius norm |up @ down|^2, computed from the factors."""
    return ((factors.up.mT @ factors.up) * (factors.down @ factors.down.mT)).sum().item()
