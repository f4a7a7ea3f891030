import itertools
import json
import math
from unittest.mock import patch

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import rite_diffusion as rite
from forks import forked_command
from rite_diffusion.backbones.ordered import rows_of
from rite_diffusion.cli import output as terminal
from rite_diffusion.config import from_toml
from rite_diffusion.errors import ConfigError, RunError
from rite_diffusion.methods import METHODS, PlainLora
from rite_diffusion.optim import OPTIMIZERS
from rite_diffusion.photos.dataset import Encoding, encode_photos
from rite_diffusion.photos.folder import read_folder
from rite_diffusion.training import loss
from rite_diffusion.training.configured import step_batch, step_loss
from rite_diffusion.training.job import Job
from rite_diffusion.training.plan import plan_training
from rite_diffusion.training.run import measure
from rite_diffusion.training.settings import configure
from rite_diffusion.training.trainer import StepReport, Trainer, build_optimizer, train_steps
from rite_diffusion.types import Concept
from runs import config_of, metrics, train


def test_a_run_writes_the_documented_files(photos, tmp_path):
    adapter = train(photos, tmp_path / "run")
    run = tmp_path / "run"
    assert adapter == run / "adapter.safetensors"
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-000002", "step-000003"]
    assert sorted(p.name for p in (run / "previews").iterdir()) == [
        "step-000002-0.png",
        "step-000002-1.png",
    ]
    assert not (run / "lock").exists()
    config = from_toml((run / "config.toml").read_text())
    assert (config.steps, config.resolution, config.optim.lr) == (3, 64, 2e-3)
    info = rite.inspect(adapter).info
    assert (info.trigger, info.class_noun, info.base, info.steps) == (
        "<thing>",
        "toy",
        "pocket",
        "3",
    )
    assert str(tmp_path) not in adapter.read_bytes().decode("latin-1")


def test_the_adapter_is_a_function_of_the_seed(photos, tmp_path):
    first, again, other = (
        rite.inspect(train(photos, tmp_path / name, seed=seed))
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    for one, two, three in zip(first.pairs, again.pairs, other.pairs, strict=True):
        assert torch.equal(one.down, two.down) and torch.equal(one.up, two.up)
        assert not torch.equal(one.down, three.down)


def loss_at(backbone, method, data, config, step):
    return step_loss(backbone, method, step_batch(backbone, data, config, step), config)


@torch.no_grad()
def _mean_loss(backbone, method, data, config) -> float:
    """The loss at fixed noise and timesteps that training never uses."""
    return sum(loss_at(backbone, method, data, config, 10_000 + i).item() for i in range(8)) / 8


def test_training_lowers_the_loss_and_leaves_the_base_alone(photos, pocket):
    config = config_of(photos, steps=60, batch=4)
    found = read_folder(photos, Concept("<thing>", "toy"), config.templates).photos
    data = encode_photos(pocket, found, Encoding(64))
    before = {name: part.state_dict() for name, part in pocket.components.items()}
    method = PlainLora(pocket, config)
    before_training = _mean_loss(pocket, method, data, config)
    train_steps(Job(pocket, method, data, config), lambda report: None)
    assert _mean_loss(pocket, method, data, config) < 0.9 * before_training
    method.remove()
    for name, part in pocket.components.items():
        assert all(torch.equal(v, before[name][k]) for k, v in part.state_dict().items())


def test_a_step_is_a_function_of_seed_and_step(photos, pocket):
    config = config_of(photos)
    found = read_folder(photos, Concept("<thing>", "toy"), config.templates).photos
    data = encode_photos(pocket, found, Encoding(64))
    method = PlainLora(pocket, config)
    losses = [loss_at(pocket, method, data, config, step).item() for step in (5, 6, 5)]
    assert losses[0] == losses[2] != losses[1]


class Accumulations(TorchDispatchMode):
    """Collects the places to which an operation adds up values in no fixed order."""

    def __init__(self):
        super().__init__()
        self.repeated = []

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        if "index_put" in str(operation) and len(arguments) > 3 and arguments[3]:
            places = torch.stack(torch.broadcast_tensors(*filter(torch.is_tensor, arguments[1])))
            if len(places.flatten(1).unique(dim=1).T) < places[0].numel():
                self.repeated.append((operation, places))
        return operation(*arguments, **options or {})


@pytest.mark.parametrize("method", ["lora", "pivotal", "custom_diffusion", "ed_lora"])
def test_training_steps_avoid_nondeterministic_sums(photos, method):
    for caption in photos.glob("*.txt"):
        caption.unlink()
    wanted = {"photos": str(photos), "trigger": "<a> <b>", "class_noun": "toy", "method": method}
    plan = plan_training(configure(wanted | {"batch": 4, "prior": {"weight": 0}}))
    data = encode_photos(plan.backbone, plan.photos, plan.encoding)
    job = Job(plan.backbone, METHODS[method](plan.backbone, plan.config), data, plan.config)
    with Accumulations() as found:
        Trainer(job).step(0)
    assert found.repeated == []


def test_gradients_of_repeated_rows_are_deterministic():
    values = torch.randn(2, 77, 256, requires_grad=True)
    places, weights = [0, 0, 1, 0, 0], torch.randn(5, 77, 256)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for _ in range(50):
            values.grad = None
            rows = rows_of(values, places)
            rows.backward(weights)
            assert torch.equal(
                values.grad[0], ((weights[0] + weights[1]) + weights[3]) + weights[4]
            )
            assert torch.equal(values.grad[1], weights[2])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(rows, values[places])
    assert rows_of(values, []).shape == (0, 77, 256)


def test_equal_captions_are_encoded_once_with_the_gradients_of_each(photos, pocket):
    captions = ["a <thing>", "a photo of a <thing>", "a <thing>", "a <thing>"]
    method = PlainLora(pocket, config_of(photos))
    for pair in method.pairs():
        torch.nn.init.normal_(pair.up, std=0.02)
    weighing = torch.randn(4, 1, 1)

    def states_and_gradients(encode):
        states = encode(captions).states
        (states * weighing).square().sum().backward()
        texts = [p for n, p in pocket.text_encoder.named_parameters() if p.requires_grad]
        gradients = [p.grad.clone() for p in texts]
        for parameter in texts:
            parameter.grad = None
        return [states, *gradients]

    with patch.object(pocket, "encode_captions", wraps=pocket.encode_captions) as encode:
        found = states_and_gradients(method.conditioning)
    encode.assert_called_once_with(captions[:2])
    wanted = states_and_gradients(pocket.encode_prompts)  # sums in another order
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


def test_a_text_encoder_that_does_not_train_encodes_a_caption_once(photos, pocket):
    method = PlainLora(pocket, config_of(photos, lora={"text_encoder": False}))
    with patch.object(pocket, "encode_captions", wraps=pocket.encode_captions) as encode:
        first = method.conditioning(["a <thing>", "a photo of a <thing>", "a <thing>"]).states
        again = method.conditioning(["a photo of a <thing>"]).states
    assert [call.args[0] for call in encode.call_args_list] == [
        ["a <thing>"],
        ["a photo of a <thing>"],
    ]
    assert torch.equal(again[0], first[1]) and torch.equal(first[0], first[2])
    expected = pocket.encode_prompts(["a <thing>", "a photo of a <thing>"]).states
    torch.testing.assert_close(first[:2], expected)


def test_progress_is_printed_as_lines_without_a_terminal(capsys, monkeypatch):
    now = itertools.count(step=10)
    monkeypatch.setattr(terminal.time, "monotonic", lambda: next(now))
    with terminal.training_progress(9) as progress:
        for step in range(1, 10):
            progress(StepReport(step, 0.5, 1e-3, 2.0, [], None))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0].split() for line in lines] == [
        ["training", "step", str(step), "of", "9"] for step in (1, 4, 7, 9)
    ]
    assert lines[1].endswith("loss 0.5000, 2.0 images/s, about 0:00:50 left")


def test_pairs_train_in_fp32_with_half_precision(photos, tmp_path):
    adapter = rite.inspect(train(photos, tmp_path / "half", steps=3, precision="bf16"))
    reference = rite.inspect(train(photos, tmp_path / "single", steps=3))
    for pair, exact in zip(adapter.pairs, reference.pairs, strict=True):
        assert torch.isfinite(pair.up).all() and pair.up.dtype == torch.float32
        torch.testing.assert_close(pair.down, exact.down, rtol=0.1, atol=0.02)


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "adamw_plus"])
def test_every_optimizer_trains(photos, pocket, name):
    config = config_of(photos, optim={"name": name})
    method = PlainLora(pocket, config)
    rates = [group["lr"] for group in build_optimizer(method, config).param_groups]
    assert rates == [config.optim.lr, config.optim.lr / 2]
    method.remove()


def test_a_loss_that_is_not_finite_stops_the_run(photos, tmp_path, monkeypatch):
    broken = lambda prediction, _: prediction * float("nan")  # noqa: E731
    monkeypatch.setattr(loss, "squared_error", broken)
    with pytest.raises(RunError, match=r"with .*\.png: lower optim.lr"):
        train(photos, tmp_path / "run", steps=20)
    assert json.loads((tmp_path / "run/status.json").read_text())["state"] == "failed"
    assert not (tmp_path / "run/adapter.safetensors").exists()


@pytest.mark.parametrize(
    "setting",
    [
        {"objective": {"loss": "huber"}},
        {"objective": {"weighting": "min_snr"}},
        {"objective": {"weighting": "debiased"}},
        {"objective": {"timesteps": "logit_normal"}},
        {"objective": {"noise_offset": 0.3}},
        {"objective": {"input_perturbation": 0.3}},
        {"captions": {"dropout": 0.9}},
        {"captions": {"shuffle": True, "keep": 0}},
    ],
    ids=str,
)
def test_every_setting_of_the_loss_changes_it(photos, pocket, setting):
    for photo in photos.glob("*.png"):
        photo.with_suffix(".txt").write_text("a <thing>, on the left, on a red background")
    found = read_folder(photos, Concept("<thing>", "toy"), ["a {trigger}"]).photos
    data = encode_photos(pocket, found, Encoding(64))
    plain, changed = config_of(photos), config_of(photos, **setting)
    method = PlainLora(pocket, plain)
    losses = [loss_at(pocket, method, data, each, 3).item() for each in (plain, changed)]
    assert losses[0] != losses[1] and all(map(math.isfinite, losses))


@pytest.mark.parametrize(
    "setting",
    [{"batch": 2, "accumulate": 2}, {"batch": 4, "gradient_checkpointing": True}],
    ids=str,
)
def test_memory_saving_settings_give_the_same_weights(photos, tmp_path, setting):
    # At a small rate: after larger steps, rounding of the first shows in the gradients of the next.
    optim = {"name": "sgd", "lr": OPTIMIZERS["sgd"].lr / 10}
    settings = {"precision": "fp32", "previews": {"every": 0}, "optim": optim}
    whole = rite.inspect(train(photos, tmp_path / "whole", batch=4, **settings))
    parts = rite.inspect(train(photos, tmp_path / "parts", **setting, **settings))
    assert any(pair.up.abs().max() > 0 for pair in whole.pairs)
    for one, two in zip(whole.pairs, parts.pairs, strict=True):
        torch.testing.assert_close(one.up, two.up, rtol=1e-3, atol=1e-6)


def test_a_single_bad_step_changes_nothing(photos, pocket, monkeypatch):
    config = config_of(photos, steps=1)
    found = read_folder(photos, Concept("<thing>", "toy"), config.templates).photos
    data = encode_photos(pocket, found, Encoding(64))
    method = PlainLora(pocket, config)
    before = [pair.down.clone() for pair in method.pairs()]
    broken = lambda prediction, _: prediction * float("nan")  # noqa: E731
    monkeypatch.setattr(loss, "squared_error", broken)
    train_steps(Job(pocket, method, data, config), lambda report: None)
    for pair, value in zip(method.pairs(), before, strict=True):
        assert torch.equal(pair.down, value) and pair.up.abs().max() == 0


@pytest.mark.parametrize("trigger", ["robot", "Dog"])
def test_a_trigger_that_the_base_knows_is_refused(photos, trigger):
    with pytest.raises(ConfigError, match=f"use a new word such as '<{trigger}>'"):
        plan_training(config_of(photos, trigger=trigger))


def test_compiling_the_denoiser_can_be_undone(photos, pocket, monkeypatch):
    calls = []
    monkeypatch.setattr(pocket.unet, "compile", lambda: calls.append("compiled"))
    pocket.compile_denoiser(True)
    pocket.compile_denoiser(False)
    assert calls == ["compiled"] and pocket.unet._compiled_call_impl is None


@pytest.mark.full_size  # torch.compile takes minutes on a CPU
def test_a_compiled_denoiser_trains_the_same(photos, tmp_path):
    settings = {"steps": 2, "previews": {"every": 0}, "optim": {"name": "sgd"}}
    plain = rite.inspect(train(photos, tmp_path / "plain", **settings))
    fast = rite.inspect(train(photos, tmp_path / "fast", compile=True, **settings))
    for one, two in zip(plain.pairs, fast.pairs, strict=True):
        torch.testing.assert_close(one.up, two.up, rtol=1e-2, atol=1e-5)


def test_metrics_go_to_tensorboard(photos, tmp_path):
    train(photos, tmp_path / "run", trackers=["tensorboard"], validation={"photos": 1})
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    [folder] = {path.parent for path in (tmp_path / "run/trackers").rglob("*.tfevents.*")
                if "loss" in EventAccumulator(str(path)).Reload().Tags()["scalars"]}  # fmt: skip
    events = EventAccumulator(str(folder)).Reload()
    logged = [event.value for event in events.Scalars("loss")]
    assert logged == pytest.approx([loss for _, loss, _ in metrics(tmp_path / "run")])
    assert len(events.Scalars("validation")) == 1


def test_measuring_a_plans_cost_writes_nothing(photos):
    plan = plan_training(config_of(photos))
    before = {name: part.state_dict() for name, part in plan.backbone.components.items()}
    cost = measure(plan)
    assert 0 < cost.seconds_per_step < 60 and 1e8 < cost.peak_bytes < 1e11
    for name, part in plan.backbone.components.items():
        assert part.state_dict().keys() == before[name].keys()


def test_two_processes_equal_one_with_twice_the_batch(photos, tmp_path, unused_port):
    line = ["train", str(photos), "--trigger", "<t>", "--class", "toy", "--steps", "3"]
    line += ["--set", "previews.every=0", "--set", "optim.name=sgd", "--set", "prior.weight=0"]
    launch = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(unused_port)}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} | launch for rank in range(2)]
    for name, places, batch in (("two", ranks, 2), ("one", [{}], 4)):
        here = [*line, "--set", f"batch={batch}", "--out", str(tmp_path / name)]
        told = [tmp_path / f"{name}-{index}.txt" for index in range(len(places))]
        processes = [
            forked_command(here, file, **place) for file, place in zip(told, places, strict=True)
        ]
        for process, file in zip(processes, told, strict=True):
            process.join(300)
            assert process.exitcode == 0, file.read_text()
        assert "adapter.safetensors" in told[0].read_text()
    one, two = (rite.inspect(tmp_path / name / "adapter.safetensors") for name in ("one", "two"))
    assert any(pair.up.abs().max() > 0 for pair in one.pairs)
    for first, second in zip(one.pairs, two.pairs, strict=True):
        torch.testing.assert_close(first.up, second.up, rtol=1e-3, atol=1e-6)
    losses = [[loss for _, loss, _ in metrics(tmp_path / name)] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
