"""The LoRA-aware optimizers where factors are zero, deficient or in low precision."""

import pytest
import torch

from factors import FAST, Factors
from rite_diffusion.errors import OptimizerError
from rite_diffusion.optim import LoraRite, ScaledAdamW, ScaledSGD, lora_param_groups


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FAST)
def test_a_fresh_adapter_gets_a_first_update(name, dtype):
    model = Factors([(12, 9), (12, 9)], rank=3, dtype=dtype, zero_up=True)
    start = [down.detach().clone() for down, _ in model.pairs()]
    optimizer = FAST[name](lora_param_groups(model), lr=0.02)
    model.run(optimizer, 1)
    for (down, up), before in zip(model.pairs(), start, strict=True):
        assert torch.equal(down, before) or name != "rite"
        assert up.abs().max() > 0
    first = model.loss().item()
    model.run(optimizer, 20)
    assert all(p.isfinite().all() for p in model.parameters())
    assert model.loss().item() < first
    assert all(
        v.dtype == torch.float32
        for stack in optimizer._stacks
        for s in stack.state
        for v in s.values()
    )


@pytest.mark.parametrize("name", FAST)
def test_rank_deficient_factors_stay_finite(name):
    model = Factors([(12, 9), (12, 9)], rank=4, dtype=torch.float32)
    with torch.no_grad():
        (down, up), (down2, _) = model.pairs()
        up[:, 1] = up[:, 0]
        down[2] = 0
        down2.copy_(down2[:1].expand_as(down2))
    model.run(FAST[name](lora_param_groups(model), lr=1e-3), 20)
    assert all(p.isfinite().all() and p.abs().max() < 1e3 for p in model.parameters())


def nearly_deficient(dtype, share):
    """Pairs of rank 8 whose last four directions nearly depend on the first four."""
    model = Factors([(24, 40), (40, 24)], rank=8)
    with torch.no_grad():
        for down, up in model.pairs():
            mixing = torch.randn(2, 4, 4, dtype=up.dtype)
            up[:, 4:] = up[:, :4] @ mixing[0] + share * up[:, 4:]
            down[4:] = mixing[1] @ down[:4] + share * down[4:]
    return model.to(dtype)


@pytest.mark.parametrize("share", [1e-1, 1e-2])
def test_rites_rounding_stays_small_where_factors_are_ill_conditioned(share):
    exact, rounded = nearly_deficient(torch.float64, share), nearly_deficient(torch.float32, share)
    for model in (exact, rounded):
        model.run(LoraRite(lora_param_groups(model), lr=1e-3), steps=100)
    for one, other in zip(rounded.products(), exact.products(), strict=True):
        assert (one - other).norm() < 1e-3 * other.norm()


@pytest.mark.parametrize("lr", [1e-3, 1e-2])
@pytest.mark.parametrize("share", [1e-3, 1e-5, 1e-7, 0.0])
def test_rite_is_stable_where_factors_are_nearly_rank_deficient(share, lr):
    # To the letter, both factors' steps meet in the lost directions: products of 100 and more
    model = nearly_deficient(torch.float32, share)
    before = model.loss().item()
    model.run(LoraRite(lora_param_groups(model), lr=lr), steps=100)
    assert model.loss().item() < before
    for product, target in zip(model.products(), model.targets, strict=True):
        assert product.norm() < target.norm()


@pytest.mark.parametrize("rule", [ScaledSGD, ScaledAdamW])
def test_no_damping_needs_full_rank(rule):
    model = Factors([(12, 9), (12, 9)], rank=3)
    with torch.no_grad():
        model.layer1["lora_B"].zero_()
    optimizer = rule(lora_param_groups(model), damping=0.0)
    with pytest.raises(OptimizerError, match="layer1: a LoRA factor is rank deficient"):
        model.run(optimizer, 1)
