"""Make the embedded bases: `python -m train.pocket STAGE --work DIR`.

A stage writes its state into DIR every five minutes and goes on from there when started again, or
from the weights that the repository keeps.
"""

import argparse
import json
from dataclasses import fields, replace
from pathlib import Path

from benchmarks.machine import RESULTS, describe
from rite_diffusion.evaluation.judge import save_judge

from . import autoencoder, denoiser, emoji, held_out, judge, judge_figures
from .machine import keep_weights, take_kept, this_machine

ROOT = Path(__file__).parents[2]


def _settings(default, given: list[str]):
    """A stage's settings with `name=value` changes."""
    kinds = {field.name: type(getattr(default, field.name)) for field in fields(default)}
    changes = {}
    for entry in given:
        name, value = entry.split("=", 1)
        kind = kinds[name]
        changes[name] = tuple(map(int, value.split(","))) if kind is tuple else kind(value)
    return replace(default, **changes)


def run_autoencoder(work: Path, given: list[str]) -> None:
    """Train the autoencoder."""
    settings, machine = _settings(autoencoder.Settings(), given), this_machine()
    autoencoder.train(work, settings, machine)


def run_decoder(work: Path, given: list[str]) -> None:
    """Train the narrow decoder, measure the autoencoder and write it as a diffusers folder."""
    settings, machine = _settings(autoencoder.Settings(), given), this_machine()
    autoencoder.train_decoder(work, settings, machine)
    network = autoencoder.finished(work, settings)
    network.half().save_pretrained(work / "vae")
    network.float().to(machine.device)
    found = held_out.figures(network, machine)
    (work / "autoencoder.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


def run_denoiser(work: Path, name: str, given: list[str]) -> None:
    """Train the base `name` on the autoencoder in `work` and write it as a diffusers folder.

    It may start as soon as the autoencoder's encoder is held; the decoder is read at each start.
    """
    settings, machine = _settings(denoiser.Settings(), given), this_machine()
    network = autoencoder.finished(work, autoencoder.Settings()).to(machine.device)
    denoiser.train(work, name, network, settings, machine)


def run_judge(work: Path, given: list[str]) -> None:
    """Train the judge, set its threshold, measure it, and write it and its figures."""
    settings, machine = _settings(judge.Settings(), given), this_machine()
    judge.train(work, settings, machine)
    made = judge_figures.measured(judge.finished(work, settings), settings.shape)
    save_judge(made, work / "judge.safetensors")
    judge_figures.contact_sheet(made).save(work / "judge.png")
    found = {
        "command": " ".join(
            ["python -m train.pocket judge", *(["--set", *given] if given else [])]
        ),
        "machine": describe(),
        "pictures": settings.pictures,
        "threshold": made.threshold,
        "accuracy": made.accuracy,
    }
    (RESULTS / "judge_128.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


def keep(work: Path, given: list[str]) -> None:
    """Copy the weights of the trainings in `work` into the repository, in fp16.

    Where a work folder is lost, its trainings go on from there. `--set` names some of them:
    `autoencoder`, `unet`, `unet-text`, …
    """
    for name in given or [path.stem for path in sorted(work.glob("*.safetensors"))]:
        if not name.startswith("latents"):
            print(keep_weights(work / f"{name}.safetensors"))


STAGES = {
    "keep": keep,
    "autoencoder": run_autoencoder,
    "decoder": run_decoder,
    "unet": lambda work, given: run_denoiser(work, "unet", given),
    "flow": lambda work, given: run_denoiser(work, "flow", given),
    "judge": run_judge,
}


def main() -> None:
    """Run one stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--work", type=Path, default=ROOT / "runs/pocket", help="state and sheets")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings")
    parser.add_argument("--anew", action="store_true", help="do not go on from kept weights")
    options = parser.parse_args()
    emoji.fetch()
    options.work.mkdir(parents=True, exist_ok=True)
    if not options.anew and options.stage != "keep":
        take_kept(options.work)
    STAGES[options.stage](options.work, options.set)


if __name__ == "__main__":
    main()
