"""Noise schedules read from a base's scheduler; a flow base is trained and drawn from."""

import json
import shutil

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
)

import rite_diffusion as rite
from rite_diffusion.backbones.schedule import (
    ddpm_schedule,
    flow_schedule,
    noise_schedule,
    prediction_type,
    sampler,
)
from rite_diffusion.backbones.source import load_backbone
from rite_diffusion.errors import BackboneError, ConfigError
from rite_diffusion.generation.denoise import denoising, guided
from rite_diffusion.methods import PlainLora
from rite_diffusion.photos.dataset import encode_photos
from rite_diffusion.training.configured import step_batch, step_loss
from rite_diffusion.training.job import Job
from rite_diffusion.training.objective import TARGETS, add_noise, flow_target, timestep_weight
from rite_diffusion.training.plan import plan_training
from rite_diffusion.training.trainer import train_steps
from runs import config_of


@pytest.fixture(scope="module")
def flow_folder(tmp_path_factory, tiny_folder):
    """A diffusers folder in Stable Diffusion's shape whose scheduler is a shifted flow's."""
    folder = tmp_path_factory.mktemp("flow") / "tiny-flow"
    shutil.copytree(tiny_folder, folder)
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return str(folder)


def test_a_ddpm_schedule_has_the_schedulers_own_coefficients():
    scheduler = PNDMScheduler(prediction_type="v_prediction")
    assert prediction_type(scheduler, "it") == "v_prediction"
    schedule = noise_schedule(scheduler, "it")
    assert len(schedule) == 1000 and torch.equal(schedule.times, torch.arange(1000))
    latents, noise = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    at = torch.tensor([0, 500, 999])
    ours = add_noise(latents, noise, schedule.signal[at], schedule.sigma[at])
    torch.testing.assert_close(ours, DDIMScheduler().add_noise(latents, noise, at))
    torch.testing.assert_close(schedule.snr, (schedule.signal / schedule.sigma) ** 2)


def test_places_are_floored_to_a_tables_timesteps():
    schedule = noise_schedule(DDIMScheduler(), "it")
    places = torch.tensor([0.0, 0.4999, 0.5, 0.9999999])
    levels = schedule.levels(places, (8, 8))
    assert levels.times.tolist() == [0, 499, 500, 999]
    for name in ("signal", "sigma", "snr"):
        table = getattr(schedule, name)
        assert torch.equal(getattr(levels, name), table[levels.times])
    with pytest.raises(ConfigError, match=r"objective\.shift is for bases with a continuous flow"):
        schedule.levels(places, (8, 8), shift=2.0)


def test_a_flow_schedule_has_the_schedulers_own_coefficients():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    assert prediction_type(scheduler, "it") == "flow"
    schedule = noise_schedule(scheduler, "it")
    share = torch.arange(1, 1001) / 1000
    torch.testing.assert_close(schedule.sigma, 3 * share / (1 + 2 * share))
    torch.testing.assert_close(schedule.signal + schedule.sigma, torch.ones(1000))
    torch.testing.assert_close(schedule.snr, (schedule.signal / schedule.sigma) ** 2)
    latents, noise = torch.randn(1, 4, 2, 2), torch.randn(1, 4, 2, 2)
    for at in (0, 600, 999):
        ours = add_noise(latents, noise, schedule.signal[at], schedule.sigma[at])
        [time] = schedule.times[at : at + 1]
        torch.testing.assert_close(ours, scheduler.scale_noise(latents, time[None], noise))


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_sampling_a_perfect_flow_model_gives_its_picture(shift):
    clean, noise = torch.randn(2, 4, 4, 4), torch.randn(2, 4, 4, 4)
    steps = sampler("flow", FlowMatchEulerDiscreteScheduler(shift=shift).config)
    steps.set_timesteps(5)
    latents = noise
    for timestep in steps.timesteps:
        latents = steps.scale_model_input(latents, timestep)
        made = steps.step(flow_target(clean, noise, None, None), timestep, latents)
        torch.testing.assert_close(made.pred_original_sample, clean, atol=1e-5, rtol=0)
        latents = made.prev_sample
    torch.testing.assert_close(latents, clean, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("scheduler", "words"),
    [
        (DDIMScheduler(prediction_type="sample"), "DDIMScheduler for predictions of 'sample'"),
        (EDMEulerScheduler(), "EDMEulerScheduler for predictions of 'epsilon'"),
        (FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), "use_dynamic_shifting"),
        (FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "invert_sigmas"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_schedules_are_refused_by_name(scheduler, words):
    with pytest.raises(BackboneError, match=f"my/base has a .*{words}"):
        prediction_type(scheduler, "my/base")
        noise_schedule(scheduler, "my/base")


def test_a_flow_model_learns_its_photos(flow_folder, photos):
    optim = {"lr": 3e-2, "schedule": "constant"}
    config = config_of(
        photos, base=flow_folder, resolution=64, steps=40, batch=4, precision="fp32", optim=optim,
        lora={"layers": "attention", "rank": 8},
    )  # fmt: skip
    plan = plan_training(config)
    assert plan.backbone.prediction_type == "flow"
    data = encode_photos(plan.backbone, plan.photos, plan.encoding)
    method = PlainLora(plan.backbone, plan.config)

    @torch.no_grad()
    def mean_loss():
        batches = (step_batch(plan.backbone, data, plan.config, 9000 + i) for i in range(6))
        return sum(step_loss(plan.backbone, method, each, plan.config) for each in batches) / 6

    before = mean_loss()
    train_steps(Job(plan.backbone, method, data, plan.config), lambda report: None)
    assert mean_loss() < 0.97 * before
    method.remove()


def test_the_flow_loss_equals_its_equations(flow_folder, photos):
    plan = plan_training(config_of(photos, base=flow_folder, resolution=64, precision="fp32"))
    backbone, config = plan.backbone, plan.config
    data = encode_photos(backbone, plan.photos, plan.encoding)
    method = PlainLora(backbone, config)
    batch = step_batch(backbone, data, config, 3)
    errors = []
    for i in range(config.batch):
        share = (int(batch.places[i] * 1000) + 1) / 1000
        sigma = 3 * share / (1 + 2 * share)
        noisy = (1 - sigma) * batch.latents[i] + sigma * batch.noise[i]
        time, states = torch.tensor([1000 * sigma]), backbone.encode_prompts([batch.captions[i]])
        velocity = backbone.denoise(noisy[None], time, states)[0]
        errors.append((velocity - (batch.noise[i] - batch.latents[i])).square().mean().item())
    loss = step_loss(backbone, method, batch, config).item()
    assert loss == pytest.approx(sum(errors) / len(errors), rel=1e-4)


def test_a_flow_base_trains_with_previews_and_draws(flow_folder, photos, tmp_path):
    adapter = rite.train(
        photos, trigger="<thing>", class_noun="toy", base=flow_folder, out=tmp_path / "run",
        steps=3, batch=2, precision="fp32", resolution=64, validation={"photos": 1},
        objective={"weighting": "min_snr"}, previews={"every": 3, "steps": 2},
    )  # fmt: skip
    assert len(list((tmp_path / "run/previews").iterdir())) == 2
    [image] = rite.generate("a <thing>", adapters=[adapter], base=flow_folder, steps=3)
    assert len(set(image.get_flattened_data())) > 10
    backbone = load_backbone(flow_folder)
    draw = guided(backbone, ["a cat"], "", 2.0)
    *_, before_last, last = denoising(backbone, draw, [1], steps=4)
    assert torch.isfinite(last).all() and not torch.equal(before_last, last)


@pytest.mark.parametrize("weighting", ["min_snr", "debiased"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow"])
def test_timestep_weights_are_those_of_the_clean_latents_error(kind, weighting):
    """An error of the prediction, times its weight, is the clean latents' times theirs."""
    shares = torch.tensor([0.99, 0.6, 0.05], dtype=torch.float64)
    schedule = flow_schedule(1 - shares, 1000) if kind == "flow" else ddpm_schedule(shares)
    clean, noise, slip = (torch.randn(3, 4, 4, 4, dtype=torch.float64) for _ in range(3))
    signal, sigma = (each.view(-1, 1, 1, 1) for each in (schedule.signal, schedule.sigma))
    noisy = signal * clean + sigma * noise
    guess = TARGETS[kind](clean, noise, schedule.signal, schedule.sigma) + 0.1 * slip
    recovered = {
        "epsilon": lambda: (noisy - sigma * guess) / signal,
        "v_prediction": lambda: signal * noisy - sigma * guess,
        "flow": lambda: noisy - sigma * guess,
    }[kind]()
    error, clean_error = (each.square().mean((1, 2, 3)) for each in (0.1 * slip, recovered - clean))
    wanted = schedule.snr.clamp(max=5) if weighting == "min_snr" else schedule.snr.sqrt()
    weight = timestep_weight(kind, schedule.snr, weighting, 5.0)
    torch.testing.assert_close(weight * error, wanted * clean_error)
