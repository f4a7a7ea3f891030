"""Work that a test kills; a module of its own, so that a fork server can load it."""

import itertools
import os
import shutil
import signal
from pathlib import Path

import torch

import rite_diffusion.api.train  # noqa: F401 - everything heavy, once for all forks
from rite_diffusion.adapters import Adapter, AdapterInfo, save_adapter
from rite_diffusion.training.run_folder import RunFolder
from rite_diffusion.training.snapshot import Snapshot
from rite_diffusion.types import LoraPair
from runs import train

SETTINGS = {"steps": 40, "checkpoints": {"every": 2}, "previews": {"every": 0}}
LAYER = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
# What touches the disk when a run saves.
WRITES = [
    (os, "fsync"),
    (shutil, "rmtree"),
    *((Path, name) for name in ("mkdir", "open", "rename", "replace", "unlink")),
]


def run(photos: Path, out: Path, steps: int = SETTINGS["steps"]) -> None:
    """Train with a checkpoint after every other step; goes on where it was killed."""
    torch.set_num_threads(1)  # sums depend on it, and every process has its own number
    train(photos, out, **SETTINGS | {"steps": steps})


def run_threaded(photos: Path, out: Path) -> None:
    """Train with two threads, on batches in which all captions are one.

    PyTorch shares a sum out among threads from 32,768 numbers on: twelve captions have more.
    """
    torch.set_num_threads(2)
    settings = {"steps": 6, "batch": 12, "resolution": 32, "checkpoints": {"every": 1}}
    train(photos, out, **SETTINGS | settings | {"templates": ["a {trigger}"]})


def save_step(folder: Path, step: int) -> None:
    """Do to a run folder what a run does after a step that is its last."""
    weights = torch.full((2, 8), float(step))
    adapter = Adapter([LoraPair(LAYER, weights, weights.mT, 1.0)], AdapterInfo(steps=str(step)))
    with RunFolder(folder) as held:
        held.write_metrics(step=step, loss=0.5)
        held.save_checkpoint(adapter, Snapshot(step, {"weights/a": weights}), keep=1)
        held.write_status("running", step, 9)
        save_adapter(held.adapter_path, adapter)


def save_step_and_die(folder: Path, step: int, point: int) -> None:
    """The same, killed just before it touches the disk for the `point`-th time."""
    calls = itertools.count()

    def deadly(function):
        def call(*arguments, **options):
            if next(calls) == point:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call

    for owner, name in WRITES:
        setattr(owner, name, deadly(getattr(owner, name)))
    save_step(folder, step)
