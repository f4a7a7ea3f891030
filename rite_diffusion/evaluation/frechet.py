"""Distances between sets of pictures: of their features, and of the energy of their edges."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rite_diffusion.errors import EvaluationError

from .judge import Judge

__all__ = ["edge_energy", "frechet_between", "frechet_distance"]


def frechet_distance(features: Tensor, others: Tensor) -> float:
    """Frechet distance of two Gaussians fitted to features (n, d) and (m, d) (Heusel et al. 2017).

    |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), in double precision. The trace of the root is
    that of (R S2 R)^(1/2) with R = S1^(1/2), which is symmetric.

    Raises `EvaluationError` where a set has no more vectors than a vector has numbers: its
    covariance would not have full rank, and the distance would be too large.
    """
    (mean, covariance), (other_mean, other_covariance) = (
        _gaussian(each.double()) for each in (features, others)
    )
    root = _root(covariance)
    product = root @ other_covariance @ root
    trace_of_root = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    traces = covariance.trace() + other_covariance.trace()
    distance = (mean - other_mean).square().sum() + traces - 2 * trace_of_root
    return max(0.0, distance.item())


def frechet_between(judge: Judge, pictures: list[Image.Image], others: list[Image.Image]) -> float:
    """Frechet distance of two sets of pictures, in the judge's pooled features (2C).

    Each set needs more than 2C pictures; compare figures only of equally large sets, because few
    pictures make the distance larger.
    """
    for each in (pictures, others):
        _check_count(len(each), judge.network.noun.in_features)
    return frechet_distance(judge.pools(pictures)[0], judge.pools(others)[0])


def edge_energy(pictures: list[Image.Image]) -> float:
    """Mean squared difference of neighbouring pixels, which lie in [-1, 1].

    Of generated pictures as a share of real ones' it says how sharp they are. Pictures are taken as
    they are, so both sets must have one size.
    """
    _check_count(len(pictures), 0)
    energies = []
    for picture in pictures:
        pixels = np.asarray(picture.convert("RGB"), np.float64) / 127.5 - 1
        energies.append(sum(np.square(np.diff(pixels, axis=axis)).mean() for axis in (0, 1)))
    return float(np.mean(energies))


def _gaussian(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (d,) and covariance (d, d) of features (n, d)."""
    _check_count(*features.shape)
    return features.mean(0), features.T.cov()


def _check_count(found: int, features: int) -> None:
    if found <= features:
        raise EvaluationError(
            f"{found} pictures are too few: pass at least {features + 1} in each set."
        )


def _root(covariance: Tensor) -> Tensor:
    """Symmetric root of a symmetric matrix without negative eigenvalues."""
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T
