"""Memory by stage before weights are loaded, beside what real tensors take, and what fits."""

import re

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import rite_diffusion as rite
from command_line import run_command
from flow_models import PIPELINES, with_random_weights
from rite_diffusion.backbones.memory import stored_tensors
from rite_diffusion.backbones.simulated import Counted
from rite_diffusion.backbones.source import load_backbone, open_backbone
from rite_diffusion.config import from_toml, memory_settings
from rite_diffusion.errors import ConfigError
from rite_diffusion.methods import METHODS
from rite_diffusion.optim import OPTIMIZERS
from rite_diffusion.training import fit
from rite_diffusion.training.estimate import Estimates, part_bytes, simulate_step, state_bytes
from rite_diffusion.training.job import Job
from rite_diffusion.training.plan import plan_training
from rite_diffusion.training.settings import configure
from rite_diffusion.training.stages import encode
from rite_diffusion.training.trainer import Trainer
from runs import config_of, train

FLOW = {
    "trigger": "<thing>", "class_noun": "toy", "resolution": 64, "batch": 2, "precision": "fp32",
    "prior": {"weight": 0}, "previews": {"every": 0}, "lora": {"text_encoder": False, "rank": 2},
}  # fmt: skip


@pytest.fixture(scope="module")
def flow_folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("flows")

    def folder(name):
        torch.manual_seed(0)
        with_random_weights(PIPELINES[name]()).save_pretrained(root / name)
        return str(root / name)

    return folder


def counted_step(plan) -> int:
    """Bytes at the peak of a step on real tensors, without those there before."""
    encoded, backbone = encode(plan), plan.backbone
    method = METHODS[plan.config.method](backbone, plan.config)
    trainer = Trainer(Job(backbone, method, encoded.data, plan.config))
    backbone.checkpoint_gradients(plan.config.gradient_checkpointing)
    trainer.step(0)  # makes the optimizer's states and keeps captions
    parts = [backbone.parts.as_it_is(name) for name in backbone.parts.names]
    weights = [each for part in parts for each in (*part.parameters(), *part.buffers())]
    with Counted([each for each in weights if each.device.type != "meta"], Tensor) as counted:
        trainer.step(1)
    return counted.peak


@pytest.mark.parametrize("name", ["pocket", "z-image", "flux", "sd3"])
@pytest.mark.parametrize("recomputed", [False, True])
def test_a_simulated_step_takes_what_a_real_one_does(name, recomputed, flow_folder, photos):
    config = config_of(photos, batch=3, gradient_checkpointing=recomputed)
    if name != "pocket":
        own = FLOW | {"gradient_checkpointing": recomputed}
        config = configure({"photos": str(photos), "base": flow_folder(name)} | own)
    plan = plan_training(config)
    simulated = simulate_step(plan.backbone, plan.config, plan.config.resolution)
    near = 0.2 if name == "pocket" and recomputed else 0.1  # too low there, docs/training.md
    assert all(
        plan.backbone.parts.as_it_is(n).device.type == "meta" for n in plan.backbone.parts.names
    )
    assert simulated.activations == pytest.approx(counted_step(plan), rel=near)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_states_are_those_of_the_optimizer(name, photos, own_pocket):
    config = config_of(photos, optim={"name": name}, lora={"rank": 2})
    method = METHODS["lora"](own_pocket, config)
    expected = state_bytes(method, config)
    trainer = Trainer(Job(own_pocket, method, None, config))
    for each in method.parameters():
        each.grad = torch.randn_like(each) * 0.01
    trainer.optimizer.step()
    states = trainer.optimizer.state.values()
    found = sum(
        v.nbytes for state in states for v in state.values() if torch.is_tensor(v) and v.ndim
    )
    assert found == expected


@pytest.mark.parametrize("weights", ["full", "int8"])
def test_weights_take_what_their_headers_say(weights, flow_folder):
    pytest.importorskip("torchao")
    folder, memory = flow_folder("z-image"), memory_settings({"weights": weights})
    empty = open_backbone(folder, "bf16").parts.as_it_is("transformer")
    loaded = load_backbone(folder, "bf16", memory=memory)
    tensors = [*loaded.denoiser.parameters(), *loaded.denoiser.buffers()]
    found = sum(part.nbytes for each in tensors for part in stored_tensors(each))
    # int8 is counted 2.3 % too low on layers as small as these; why is not known
    near = 0.01 if weights == "full" else 0.03
    assert part_bytes(empty, weights, loaded.ends) == pytest.approx(found, rel=near)


def test_the_largest_stage_decides(photos):
    """Text encoders that do not train are in memory in their own stage alone."""
    for trains in (False, True):
        plan = plan_training(config_of(photos, lora={"text_encoder": trains}))
        first, second, steps = Estimates(plan.backbone, plan.config, 3).stages(plan.config)
        assert set(first.device) == {"vae", "activations"}
        assert set(second.device) == {"text_encoder"}
        assert ("text_encoder" in steps.device) == trains
        assert steps.main == {"latents": 3 * 8 * 16 * 16 * 4}


def test_the_cheapest_settings_that_fit_are_chosen(photos, monkeypatch):
    plan = plan_training(config_of(photos, batch=8))
    estimates, cpu = Estimates(plan.backbone, plan.config, 3), torch.device("cpu")
    ways = list(fit.settings_by_cost(plan.config, cpu))
    needs = [max(s.bytes + sum(s.main.values()) for s in estimates.stages(way)) for way in ways]
    assert ways[0] == plan.config and min(needs) < needs[0]
    for number, most in enumerate(needs):
        monkeypatch.setattr(fit, "system_memory", lambda most=most: most / fit.SHARE + 1)
        cheaper = [other for other in range(number) if needs[other] <= most]
        assert fit.cheapest(estimates, cpu) == ways[min([*cheaper, number])]
    monkeypatch.setattr(fit, "system_memory", lambda: min(needs) / fit.SHARE - 10)
    assert fit.cheapest(estimates, cpu) is None
    with pytest.raises(ConfigError, match=r"auto: nothing fits into 0\..*steps take.*Lower"):
        fit.with_memory_that_fits(plan.backbone, plan.config, 3)


def test_auto_is_resolved_and_trains_as_what_it_stands_for(photos, tmp_path):
    for weights in ("auto", "full"):
        train(photos, tmp_path / weights, steps=2, memory={"weights": weights})
    one, other = (load_file(tmp_path / w / "adapter.safetensors") for w in ("auto", "full"))
    assert all(torch.equal(one[key], other[key]) for key in other)
    assert from_toml((tmp_path / "auto" / "config.toml").read_text()).memory.weights == "full"


def test_auto_is_refused_where_nothing_can_be_estimated(photos):
    with pytest.raises(ConfigError, match="memory of method pivotal is not known before a step"):
        plan_training(config_of(photos, method="pivotal", memory={"weights": "auto"}))
    with pytest.raises(ConfigError, match=r"memory\.weights = auto is for a training"):
        rite.load_base("pocket", memory={"weights": "auto"})


def test_a_dry_run_tells_memory_by_stage_before_it_measures(photos):
    done = run_command("train", photos, "--trigger", "<a>", "--class", "toy", "--dry-run",
                       "--set", "prior.weight=0")  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = r"^memory +photos .*vae.*\n +captions .*text_encoder.*\n +steps .*unet.*\n(.*\n)+cost "
    assert re.search(lines, done.stdout, re.MULTILINE)
    assert re.search(r"^fits +in \d", done.stdout, re.MULTILINE)
