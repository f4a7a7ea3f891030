import math

import pytest
import torch

from rite_diffusion.training.objective import (
    TARGETS,
    add_noise,
    huber_error,
    masked_mean,
    offset_noise,
    perturb,
    squared_error,
    stratified_places,
    timestep_weight,
)

SHARES = torch.tensor([0.9, 0.5, 0.01])  # of signal, in variance
SNR = SHARES / (1 - SHARES)


def _draws():
    torch.manual_seed(0)
    return torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow"])
def test_the_clean_latents_can_be_recovered_from_each_target(kind):
    latents, noise = _draws()
    signal, sigma = SHARES.sqrt(), (1 - SHARES).sqrt()
    if kind == "flow":
        signal, sigma = 1 - SHARES, SHARES
    noisy = add_noise(latents, noise, signal, sigma)
    target = TARGETS[kind](latents, noise, signal, sigma)
    a, b = signal.view(-1, 1, 1, 1), sigma.view(-1, 1, 1, 1)
    clean = {
        "epsilon": (noisy - b * target) / a,
        "v_prediction": a * noisy - b * target,
        "flow": noisy - b * target,
    }
    torch.testing.assert_close(clean[kind], latents)


def test_errors_equal_literal_sums():
    latents, noise = _draws()
    for index in range(3):
        errors = (latents - noise)[index].flatten().tolist()
        square = sum(e * e for e in errors) / 32
        huber = sum(0.2 * (math.sqrt(e * e + 0.01) - 0.1) for e in errors) / 32
        found = masked_mean(squared_error(latents, noise), None)[index]
        assert found.item() == pytest.approx(square, rel=1e-5)
        found = masked_mean(huber_error(latents, noise, 0.1), None)[index]
        assert found.item() == pytest.approx(huber, rel=1e-5)


def test_a_mask_weighs_cells_and_is_normalised_per_picture():
    error = torch.arange(32.0).reshape(2, 1, 4, 4)
    masks = torch.zeros(2, 1, 4, 4)
    masks[0, 0, 0, 0] = 1
    masks[1, 0, 1, :2] = 0.5
    assert masked_mean(error.expand(2, 3, 4, 4), masks).tolist() == [0.0, 20.5]


def test_no_weighting_gives_weight_1():
    assert timestep_weight("epsilon", SNR, "none", 5.0).tolist() == [1, 1, 1]


def test_offset_shifts_whole_channels_and_perturbation_every_value():
    noise = _draws()[1]
    shift = offset_noise(noise, 0.5, torch.Generator().manual_seed(1)) - noise
    torch.testing.assert_close(shift, shift[..., :1, :1].expand_as(shift), atol=1e-6, rtol=0)
    assert shift.std() > 0.1
    many = torch.zeros(64, 4, 16, 16)
    extra = perturb(many, 0.1, torch.Generator().manual_seed(1))
    assert extra.std().item() == pytest.approx(0.1, rel=0.02)


def test_places_fill_every_stratum_once():
    places = stratified_places(10, torch.Generator().manual_seed(0), None)
    assert sorted((places * 10).long().tolist()) == list(range(10))


def test_logit_normal_places_have_that_density():
    clock = torch.Generator().manual_seed(0)
    logits = torch.logit(stratified_places(4000, clock, (0.5, 1.2)).double())
    assert logits.mean().item() == pytest.approx(0.5, abs=0.01)
    assert logits.std().item() == pytest.approx(1.2, abs=0.02)
