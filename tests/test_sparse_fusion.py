"""TIES, DARE and KnOTS: by hand, and against their dense forms."""

import torch

from fusion_layers import random_layer
from rite_diffusion.fusion import FUSIONS, FusionSettings
from rite_diffusion.fusion.methods.dare import bernoulli
from rite_diffusion.fusion.methods.ties import ties_merge, trim


def test_ties_equals_a_calculation_by_hand():
    updates = torch.tensor([[4.0, -1.0, 2.0, 0.1], [-2.0, -3.0, 0.1, 5.0]])
    assert torch.equal(trim(updates[0], 0.5), torch.tensor([4.0, 0.0, 2.0, 0.0]))
    assert torch.equal(ties_merge(updates, 1.0), torch.tensor([4.0, -2.0, 1.05, 2.55]))
    assert torch.equal(ties_merge(updates, 0.5), torch.tensor([4.0, -3.0, 2.0, 5.0]))


def test_dare_drops_and_rescales():
    mask = bernoulli(torch.Size([200, 200]), 0.3, "key")
    assert abs(mask.double().mean() - 0.3) < 0.01
    assert torch.equal(mask, bernoulli(torch.Size([200, 200]), 0.3, "key"))
    assert not torch.equal(mask, bernoulli(torch.Size([200, 200]), 0.3, "other"))
    layer = random_layer(2)
    kept = FUSIONS["dare"].fuse_layer(layer, FusionSettings(keep=1.0))
    torch.testing.assert_close(kept.dense(), sum(p.factors.dense() for p in layer.parts))


def test_knots_equals_ties_in_the_dense_shared_basis():
    layer = random_layer(3, out=30)
    updates = [part.factors.dense() for part in layer.parts]
    left, _, _ = torch.linalg.svd(torch.cat(updates, 1), full_matrices=False)
    left = left[:, : layer.rank]
    expected = left @ ties_merge(torch.stack([left.mT @ u for u in updates]), 0.3)
    fused = FUSIONS["knots"].fuse_layer(layer, FusionSettings(trim=0.3))
    torch.testing.assert_close(fused.dense(), expected)
    assert fused.rank == layer.rank
