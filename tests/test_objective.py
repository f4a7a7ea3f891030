import pytest
import torch

from rite_diffusion.training.objective import (
    add_noise,
    diffusion_loss,
    min_snr_weight,
    stratified_timesteps,
    target_of,
)

SIGNAL = torch.tensor([0.9, 0.5, 0.01])


def _draws():
    torch.manual_seed(0)
    return torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)


def test_velocity_and_noise_recover_the_latents():
    latents, noise = _draws()
    noisy = add_noise(latents, noise, SIGNAL)
    a, b = SIGNAL.sqrt().view(-1, 1, 1, 1), (1 - SIGNAL).sqrt().view(-1, 1, 1, 1)
    velocity = target_of("v_prediction", latents, noise, SIGNAL)
    torch.testing.assert_close(a * noisy - b * velocity, latents)
    torch.testing.assert_close(
        (noisy - b * target_of("epsilon", latents, noise, SIGNAL)) / a, latents
    )


def test_loss_equals_a_literal_sum():
    latents, noise = _draws()
    expected = 0.0
    for index, share in enumerate(SIGNAL.tolist()):
        snr = share / (1 - share)
        weight = min(snr, 5.0) / (snr + 1)
        expected += weight * sum((latents - noise)[index].flatten().square().tolist()) / 32 / 3
    loss = diffusion_loss(latents, noise, "v_prediction", SIGNAL, 5.0)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    plain = diffusion_loss(latents, noise, "epsilon", SIGNAL, None)
    assert plain.item() == pytest.approx((latents - noise).square().mean().item(), rel=1e-6)


def test_min_snr_weights_of_both_predictions_agree_in_latent_space():
    noise_weight = min_snr_weight("epsilon", SIGNAL, 5.0)
    velocity_weight = min_snr_weight("v_prediction", SIGNAL, 5.0)
    snr = SIGNAL / (1 - SIGNAL)
    torch.testing.assert_close(noise_weight * snr, velocity_weight * (snr + 1))


def test_timesteps_fill_every_stratum_once():
    timesteps = stratified_timesteps(10, 1000, torch.Generator().manual_seed(0))
    assert sorted((timesteps // 100).tolist()) == list(range(10))
