"""The Riemannian gradient of LoRA pairs, for scaled SGD and scaled AdamW."""

import torch
from torch import Tensor

from rite_diffusion.errors import OptimizerError
from rite_diffusion.optim.factors import Stack, module_of


def gram(rows: Tensor) -> Tensor:
    """Gram matrices (n, r, r) of rows (n, m, r)."""
    return rows.mT @ rows


def damped_inverse(matrix: Tensor, damping: float, stack: Stack) -> Tensor:
    """(matrix + damping I)^-1 of positive semidefinite matrices (n, r, r).

    With damping > 0, the dtype's precision times the trace is added too, so that rounding makes no
    matrix singular. With damping 0, OptimizerError names a module with a rank-deficient factor.
    """
    tiny = torch.finfo(matrix.dtype).eps
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)  # (n, r)
    trace = diagonal.sum(-1, keepdim=True)
    if damping > 0:
        matrix = matrix + torch.diag_embed(damping + tiny * trace.expand_as(diagonal))
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if damping == 0:
        pivots = factor.diagonal(dim1=-2, dim2=-1).square().amin(-1)
        singular = (failed > 0) | ~(pivots > tiny * trace.squeeze(-1))
        if singular.any():
            name = stack.names[int(singular.int().argmax())]
            raise OptimizerError(
                f"{module_of(name)}: a LoRA factor is rank deficient and damping is 0; a fresh "
                "adapter's `up` is zero, so give a damping such as 1e-6"
            )
    return torch.cholesky_inverse(factor)


def riemannian_gradient(
    stack: Stack, values: list[Tensor], gradients: list[Tensor]
) -> list[Tensor]:
    """Gradients of [down, up] in the metric of Zhang & Pilanci (2024), Sec. 3.

    g_down <- (up^T up + damping I)^-1 g_down,  g_up <- g_up (down down^T + damping I)^-1, both with
    the factors before the step. (The authors' released code updates `down` first and preconditions
    `up` with the new one.)
    """
    down, up = values  # (n, r, in), (n, out, r)
    damping = stack.group["damping"]
    return [
        damped_inverse(gram(up), damping, stack) @ gradients[0],
        gradients[1] @ damped_inverse(gram(down.mT), damping, stack),
    ]
