"""Short trainings on the pocket base, and what says that two are the same."""

import json

import pytest
import torch
from safetensors.torch import load_file

import rite_diffusion as rite
from rite_diffusion.training.settings import configure

QUICK = {
    "steps": 3,
    "batch": 2,
    "previews": {"every": 2, "steps": 2},
    "checkpoints": {"every": 1},
    "prior": {"weight": 0},  # no class pictures to draw, unless a test asks for them
    "lora": {"layers": "attention", "rank": 4},  # half of the preset's layers
}


def _quick(settings: dict) -> dict:
    return QUICK | settings | {"lora": QUICK["lora"] | settings.get("lora", {})}


def train(photos, out, **settings):
    """Train for three steps, or as the settings say."""
    return rite.train(
        photos, trigger="<thing>", class_noun="toy", preset="pocket", out=out, **_quick(settings)
    )


def config_of(photos, **settings):
    """The configuration that `train` would use."""
    wanted = {"photos": str(photos), "trigger": "<thing>", "class_noun": "toy"}
    return configure(wanted | _quick(settings), "pocket")


def metrics(run):
    """Step, loss and rate of each step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["rate"]) for line in lines]


def same_run(one, other):
    """Assert that two run folders hold the same training, bit for bit."""
    assert metrics(one) == metrics(other)
    for name in ("adapter", "training"):
        newest = [sorted((run / "checkpoints").iterdir())[-1] for run in (one, other)]
        first, second = (load_file(folder / f"{name}.safetensors") for folder in newest)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)


class Stop(Exception):
    """Stands in for a crash."""


def crash_at(step):
    """A listener that crashes after a step."""

    def progress(report):
        if report.step == step:
            raise Stop

    return progress


def whole_and_resumed(photos, folder, **settings) -> list[dict]:
    """The tensors of a run, and of the same run that crashed after step 3 and went on."""
    whole = rite.train(photos, out=folder / "whole", **settings)
    kept = settings | {"checkpoints": {"every": 2}}
    with pytest.raises(Stop):
        rite.train(photos, out=folder / "parts", on_step=crash_at(3), **kept)
    return [load_file(path) for path in (whole, rite.train(photos, out=folder / "parts", **kept))]
