"""Frechet distance and edge energy against known answers and against SciPy."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from rite_diffusion.errors import EvaluationError
from rite_diffusion.evaluation.frechet import edge_energy, frechet_between, frechet_distance
from rite_diffusion.evaluation.judge import Judge, JudgeNetwork, Shape


def exact_sample(mean, covariance, count=40):
    """Vectors (count, d) whose mean and covariance are exactly these."""
    raw = torch.randn(count, len(mean), generator=torch.Generator().manual_seed(0)).double()
    raw = raw - raw.mean(0)
    white = raw @ torch.linalg.inv(torch.linalg.cholesky(raw.T.cov())).T
    return white @ torch.linalg.cholesky(covariance).T + mean


def random_covariance(seed, d=6):
    root = torch.randn(d, d, generator=torch.Generator().manual_seed(seed)).double()
    return root @ root.T + 0.1 * torch.eye(d)


def test_gaussians_of_known_distance():
    zero, unit = torch.zeros(3).double(), torch.eye(3).double()
    one = exact_sample(zero, unit)
    moved = exact_sample(torch.tensor([3.0, 4.0, 0.0]).double(), unit)
    wider = exact_sample(zero, torch.diag(torch.tensor([4.0, 9.0, 1.0]).double()))
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(one, moved) == pytest.approx(25)
    assert frechet_distance(one, wider) == pytest.approx((2 - 1) ** 2 + (3 - 1) ** 2)


def test_the_distance_is_that_of_scipys_root():
    linalg = pytest.importorskip("scipy.linalg")
    means = [torch.linspace(0, 1, 6).double(), torch.linspace(1, -1, 6).double()]
    covariances = [random_covariance(seed) for seed in (1, 2)]
    one, two = (exact_sample(m, c) for m, c in zip(means, covariances, strict=True))
    first, second = (c.numpy() for c in covariances)
    wanted = np.square((means[0] - means[1]).numpy()).sum()
    wanted += np.trace(first + second - 2 * linalg.sqrtm(first @ second).real)
    assert frechet_distance(one, two) == pytest.approx(wanted, rel=1e-9)
    assert frechet_distance(two, one) == pytest.approx(wanted, rel=1e-9)
    assert frechet_distance(one.float(), two.float()) == pytest.approx(wanted, rel=1e-5)


@pytest.fixture(scope="module")
def judge():
    """A random network with eight features."""
    torch.manual_seed(0)
    shape = Shape(side=16, stages=((8, 0), (4, 0)), embedding=4)
    network = JudgeNetwork(2, 2, shape).eval().requires_grad_(False)
    return Judge(shape, network, ("a", "b"), ("c", "d"), torch.zeros(0, 4), (), 0.0, {})


def test_too_few_pictures_are_refused(judge):
    with pytest.raises(EvaluationError, match="6 pictures are too few: pass at least 7"):
        frechet_distance(torch.randn(20, 6), torch.randn(6, 6))
    with pytest.raises(EvaluationError, match="0 pictures are too few: pass at least 1"):
        edge_energy([])
    picture = Image.new("RGB", (8, 8))
    with pytest.raises(EvaluationError, match="8 pictures are too few: pass at least 9"):
        frechet_between(judge, [picture] * 20, [picture] * 8)


def random_pictures(count, seed):
    """Discs in random colours and places on random grounds."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:16, :16]
    found = []
    for _ in range(count):
        disc = (x - rng.uniform(4, 12)) ** 2 + (y - rng.uniform(4, 12)) ** 2 < 16
        array = np.where(disc[..., None], *rng.integers(0, 256, (2, 3), dtype=np.uint8))
        found.append(Image.fromarray(array))
    return found


def test_soft_pictures_are_farther_from_sharp_ones_than_other_sharp_ones(judge):
    sharp, others = random_pictures(100, 0), random_pictures(100, 1)
    soft = [picture.filter(ImageFilter.GaussianBlur(1.5)) for picture in others]
    distances = [frechet_between(judge, sharp, each) for each in (sharp, others, soft)]
    assert distances[0] < 1e-3 * distances[1] and distances[1] < 0.5 * distances[2]


def test_edge_energy_is_the_mean_squared_difference_of_neighbours():
    halves = np.zeros((4, 8, 3), np.uint8)
    halves[:, 4:] = 255  # one step of 2 among 7 differences in each row, none in columns
    assert edge_energy([Image.fromarray(halves)]) == pytest.approx(4 / 7)
    grey = Image.new("L", (4, 8), 77)
    assert edge_energy([grey, Image.fromarray(halves)]) == pytest.approx(2 / 7)
    soft = Image.fromarray(halves).filter(ImageFilter.GaussianBlur(1))
    assert edge_energy([soft]) < 0.5 * edge_energy([Image.fromarray(halves)])
