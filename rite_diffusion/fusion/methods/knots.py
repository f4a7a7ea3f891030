"""KnOTS: merge updates in a common basis (Stoica et al. 2024, arXiv 2410.19735)."""

import torch
from torch import Tensor

from rite_diffusion.fusion.layer import Factors, Layer
from rite_diffusion.fusion.methods.ties import ties_merge
from rite_diffusion.fusion.settings import FusionSettings


def knots(layer: Layer, settings: FusionSettings) -> Factors:
    """With [D_1 … D_n] = U [C_1 … C_n], the update U ties(C_1, …, C_n), of the sum of the ranks.

    U and C_i = S V_i^T come from a QR of the ups; no dense update is formed.
    """
    parts = [part.factors for part in layer.parts]
    basis, core = torch.linalg.qr(torch.cat([part.up for part in parts], 1))
    cores = core.split([part.rank for part in parts], 1)
    inner = [core_i @ part.down for core_i, part in zip(cores, parts, strict=True)]
    rotation = shared_basis(inner)
    aligned = torch.stack([rotation.mT @ each for each in inner])  # (n, k, inputs)
    return Factors(basis @ rotation, ties_merge(aligned, settings.trim))


def shared_basis(matrices: list[Tensor]) -> Tensor:
    """Left singular vectors (k, k) of [M_1 … M_n], for matrices of k rows."""
    moments = sum(matrix @ matrix.mT for matrix in matrices)
    return torch.linalg.eigh(moments).eigenvectors
