"""The loss scale of fp16: it goes on from a checkpoint as if nothing had been interrupted."""

import pytest
import torch
from torch import nn

from rite_diffusion.training.average import WeightAverage
from rite_diffusion.training.precision import MixedPrecision
from rite_diffusion.training.snapshot import restore_snapshot, take_snapshot

CPU = torch.device("cpu")


def new_parts(precision="fp16"):
    """A weight with its optimizer, averages and precision."""
    weight = nn.Parameter(torch.ones(4))
    group = {"params": [weight], "param_names": ["w"]}
    average = WeightAverage([("w", weight)], 0.0)
    return weight, torch.optim.AdamW([group], 0.1), average, MixedPrecision(CPU, precision)


def take_step(parts, factor):
    weight, optimizer, _, precision = parts
    precision.backward((weight * factor).square().sum())
    precision.clip(optimizer, [weight], 1.0)
    precision.step(optimizer)
    optimizer.zero_grad()


def test_an_overflow_changes_no_weight_and_halves_the_loss_scale():
    parts = new_parts()
    before, scale = parts[0].detach().clone(), 65536.0
    take_step(parts, float("inf"))
    assert torch.equal(parts[0], before)
    assert parts[3].state()["scale"].item() == scale / 2


def test_the_loss_scale_goes_on_from_a_snapshot():
    parts = new_parts()
    for factor in (1.0, float("inf"), 1.0):
        take_step(parts, factor)
    snapshot = take_snapshot(3, *parts[1:])
    assert {key for key in snapshot.tensors if key.startswith("precision/")} == {
        "precision/scale",
        "precision/growth",
    }
    again = new_parts()
    restore_snapshot(snapshot, *again[1:])
    assert again[3].state() == parts[3].state() == {"scale": 32768.0, "growth": 1}
    for _ in range(2):
        take_step(parts, 1.0)
        take_step(again, 1.0)
    assert torch.equal(again[0], parts[0]) and again[3].state() == parts[3].state()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_only_fp16_has_a_loss_scale(precision):
    parts = new_parts(precision)
    snapshot = take_snapshot(1, *parts[1:])
    assert not any(key.startswith("precision/") for key in snapshot.tensors)
    restore_snapshot(snapshot, *new_parts("fp16")[1:])  # as does a checkpoint that is older
