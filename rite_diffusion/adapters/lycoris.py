"""LyCORIS's other factorisations (Yeh et al. 2024) as delta W, and delta W as LoRA factors."""

from collections.abc import Mapping

import torch
from torch import Tensor

from rite_diffusion.adapters.delta import relative_difference

MAX_RANK = 64  # of the LoRA that stands for another factorisation
NEGLIGIBLE = 1e-6  # singular values below this share of the largest are dropped

Parts = Mapping[str, Tensor]


def loha_delta(parts: Parts) -> Tensor:
    """(w1_a w1_b) * (w2_a w2_b), elementwise: (out, in), (out, in k k) or (out, in, k, k)."""
    halves = []
    for half in ("1", "2"):
        a, b = parts[f"hada_w{half}_a"].float(), parts[f"hada_w{half}_b"].float()
        core = parts.get(f"hada_t{half}")
        halves.append(a @ b if core is None else tucker(core.float(), a, b))
    return halves[0] * halves[1]


def lokr_delta(parts: Parts) -> Tensor:
    """The Kronecker product w1 (x) w2: (out, in), (out, in k k) or (out, in, k, k)."""
    first, second = (_kronecker_factor(parts, half) for half in ("1", "2"))
    first = first.reshape(*first.shape, *[1] * (second.ndim - first.ndim))
    return torch.kron(first, second)


def _kronecker_factor(parts: Parts, half: str) -> Tensor:
    whole, core = parts.get(f"lokr_w{half}"), parts.get(f"lokr_t{half}")
    if whole is not None:
        return whole.float()
    a, b = parts[f"lokr_w{half}_a"].float(), parts[f"lokr_w{half}_b"].float()
    return a @ b if core is None else tucker(core.float(), a, b)


def factor_rank(parts: Parts) -> int | None:
    """The inner rank that alpha is divided by; None where a LoKr's factors are both whole."""
    for key in ("lokr_w2_b", "lokr_w1_b", "hada_w1_b"):
        if key in parts:
            return parts[key].shape[0]
    return None


def tucker(core: Tensor, out_factor: Tensor, in_factor: Tensor) -> Tensor:
    """A convolution's weight (out, in, k, k) of its core (p, q, k, k), (p, out) and (q, in)."""
    return torch.einsum("pqkl,po,qi->oikl", core, out_factor, in_factor)


def lora_factors(delta: Tensor) -> tuple[Tensor, Tensor, float]:
    """Down, up and the relative error of the best LoRA of at most MAX_RANK (truncated SVD)."""
    matrix = delta.flatten(1)  # (out, in * k * k)
    if min(matrix.shape) <= 4 * MAX_RANK:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(matrix, q=MAX_RANK + 16, niter=4)
        vh = v.mT
    rank = max(1, min(MAX_RANK, int((s > NEGLIGIBLE * s[0]).sum())))
    root = s[:rank].sqrt()
    up, down = u[:, :rank] * root, root[:, None] * vh[:rank]
    error = relative_difference(up @ down, matrix)
    if delta.ndim == 4:
        down, up = down.reshape(rank, *delta.shape[1:]), up[:, :, None, None]
    return down.contiguous(), up.contiguous(), error
