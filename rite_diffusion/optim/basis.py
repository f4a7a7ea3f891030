"""Orthonormal bases of LoRA factors, and steps of pairs whose product stays bounded.

Write X for one factor as rows (m, r), that is down^T or up. Its basis is X W, with an r x r matrix
W such that (X W)^T (X W) = I; `back` is W^{-T}. With R = W^{-1}, X = (X W) R, and the product is

    up @ down = Q_up C Q_down^T,    C = R_up R_down^T,

where Q = X W, and the core C (r, r) has the product's singular values.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

WELL_CONDITIONED = 1e-2  # least ratio of Cholesky pivots at which float32 is enough for the basis


def cholesky_basis(grams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """W and W^{-T} (n, r, r) from Gram matrices by Cholesky; and where (n,) they are inaccurate."""
    factor, failed = torch.linalg.cholesky_ex(grams, upper=True)
    pivots = factor.diagonal(dim1=-2, dim2=-1)
    inaccurate = (failed != 0) | ~(pivots.amin(-1) > WELL_CONDITIONED * pivots.amax(-1))
    identity = torch.eye(grams.shape[-1], dtype=grams.dtype, device=grams.device)
    factor = torch.where(inaccurate[:, None, None], identity, factor)
    basis = torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=True)
    return basis, factor.mT.contiguous(), inaccurate


def svd_basis(rows: Tensor) -> tuple[Tensor, Tensor]:
    """W and W^{-T} of rows (n, m, r) by singular values, for any condition number and rank.

    Directions with singular values below r eps times the largest, which are rounding error, are
    left out, as in a pseudo-inverse: columns of zeros in W and W^{-T}. Zero rows give zero.
    """
    _, sizes, right = torch.linalg.svd(torch.linalg.qr(precise(rows), mode="r")[1])  # X = U S right
    sizes = F.pad(sizes, (0, rows.shape[-1] - sizes.shape[-1]))  # fewer rows than the rank: m < r
    smallest = rows.shape[-1] * torch.finfo(rows.dtype).eps * sizes[:, :1]
    kept = sizes > smallest
    inverse = torch.where(kept, 1 / sizes.where(kept, 1.0), 0.0)
    sizes = sizes.where(kept, 0.0)
    return tuple((right.mT * each[:, None, :]).to(rows.dtype) for each in (inverse, sizes))


def precise(values: Tensor) -> Tensor:
    """The values in float64; unchanged on mps, which has none."""
    return values if values.device.type == "mps" else values.double()


def damped(down: Tensor, up: Tensor, reach: Tensor) -> Tensor:
    """E (n, r, r), by which `down` moves by M E for a direction M (in, r) in the basis of `up`.

    `down` and `up` are the factors' W^{-T} (n, r, r), `reach` (n,) the singular values of a step.
    Undamped, E is R_up^{-T}, and `up` moves by M_up R_down^{-T}. Both steps at once also add
    M_up C^{-1} M^T to the product: of second order in the rate, but without a bound where the
    product's singular values, those of C, are small. Therefore

        E = D R_up^{-T},    D = K (K + reach^2 I)^{-1},    K = C C^T,

    so that C^{-1} D is at most 1 / (2 reach). D depends on the product, not on how it is split. In
    the form E = (K + reach^2 I)^{-1} C R_down no factor is inverted. Only `down` is damped: were
    both, neither would begin where the product is zero. Computed in float64.
    """
    lower, upper = precise(down).mT, precise(up).mT  # R_down, R_up
    core = upper @ lower.mT
    square = core @ core.mT
    diagonal = square.diagonal(dim1=-2, dim2=-1)
    limits = torch.finfo(square.dtype)
    floor = precise(reach)[:, None] ** 2 + limits.eps * diagonal.sum(-1, keepdim=True) + limits.tiny
    factor, _ = torch.linalg.cholesky_ex(square + torch.diag_embed(floor.expand_as(diagonal)))
    return torch.cholesky_solve(core @ lower, factor).to(down)


def undamped(down: Tensor, up: Tensor) -> Tensor:
    """What is to be added to E of `damped` where `svd_basis` left directions of `down` out.

    `up` does not move along these directions, so `down` moves by itself, undamped: by the
    pseudo-inverse of what `up` has there. `down` and `up` are the factors' W^{-T} (n, r, r).
    """
    kept = F.normalize(precise(down), dim=-2, eps=torch.finfo(down.dtype).tiny)
    lost = torch.eye(down.shape[-1]).to(kept) - kept @ kept.mT
    least = torch.finfo(up.dtype).eps ** 0.5 * torch.linalg.matrix_norm(precise(up), 2)
    rtol = torch.zeros_like(least)
    return torch.linalg.pinv(lost @ precise(up), atol=least, rtol=rtol).to(up)


def in_threads(function: Callable[[Tensor], Any], matrices: Tensor) -> tuple[Tensor, ...]:
    """A batched decomposition, in threads on a CPU, where PyTorch uses only one core for it."""
    threads = torch.get_num_threads()
    if matrices.device.type != "cpu" or threads == 1 or matrices[..., 0].numel() < 2000:
        return tuple(function(matrices))
    parts = list(_pool(threads).map(function, matrices.chunk(threads)))
    return tuple(torch.cat(each) for each in zip(*parts, strict=True))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="decompose")
