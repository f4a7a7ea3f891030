"""Images per second and memory of training, beside diffusers' own train_dreambooth_lora.py.

`python benchmarks/training_throughput.py --peer train_dreambooth_lora.py` writes
results/training_throughput.json. The peer is examples/dreambooth/train_dreambooth_lora.py of the
public repository huggingface/diffusers, unchanged; it is not kept here. It needs torchvision, so
this file is run in an environment with torchvision beside torch (0.29.1 for torch 2.14.1), this
package and tensorboard; both sides run under the same interpreter.

Both train on the same model folder, photos and caption with the same batch, resolution, rank,
precision and AdamW, one after the other, in alternating order over several rounds. A ratio is that
of one round, so that a busy machine slows both its sides. trainers.py tells how steps are counted.

Each round is written as it ends, and the next call adds its own to those that were measured alike.
"""

import argparse
import hashlib
import json
import shutil
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from machine import RESULTS, write_result
from trainers import CONCEPT, EARLY, PRECISIONS, Case, preset, run_ours, run_peer
from transformers import CLIPTextConfig, CLIPTextModel

from rite_diffusion.api.demo import example_photos
from rite_diffusion.backbones.clip_tokenizer import clip_tokenizer
from rite_diffusion.backbones.families import POCKET
from rite_diffusion.backbones.stable_diffusion import StableDiffusion
from rite_diffusion.methods.lora import PlainLora
from rite_diffusion.training import trainer as loop
from rite_diffusion.training.plan import plan_training
from rite_diffusion.training.run import run_training
from rite_diffusion.training.settings import configure
from rite_diffusion.training.trainer import StepReport

NAME = "training_throughput"
PHOTOS = 24  # a multiple of every batch, so that the peer's epochs end with a whole one
SIZES = ("resolution", "batch", "steps")
MODELS = {"pocket": (64, 8, 30), "sd15_half": (256, 1, 20)}
TEXT = ("trained", "frozen")  # the text encoder
PACKAGES = ("torchvision", "diffusers", "transformers", "peft", "accelerate")
# Of our step: the functions whose time counts as each part's.
PARTS = {
    "data": (loop, "step_batch"),
    "text encoder, forward": (PlainLora, "conditioning"),
    "denoiser, forward": (StableDiffusion, "denoise"),
    "backward": (Accelerator, "backward"),
    "gradient clipping": (Accelerator, "clip_grad_norm_"),
    "optimizer": (AcceleratedOptimizer, "step"),
}


def half_width_sd15(folder: Path) -> Path:
    """Stable Diffusion 1.5's architecture with every width halved and random weights, saved."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=32, block_out_channels=(160, 320, 640, 640), cross_attention_dim=384
    )
    vae = AutoencoderKL(
        block_out_channels=(64, 128, 256, 256),
        layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    clip = CLIPTextConfig(
        hidden_size=384, intermediate_size=1536, num_hidden_layers=12, num_attention_heads=6
    )
    pipeline = StableDiffusionPipeline(
        unet=unet,
        vae=vae,
        text_encoder=CLIPTextModel(clip),
        tokenizer=clip_tokenizer(),
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


def copied_photos(folder: Path) -> Path:
    """Some of the example photos without their captions: the peer opens every file as a picture."""
    folder.mkdir()
    for photo in sorted(example_photos("robot").parent.glob("*/*.jpg"))[:PHOTOS]:
        shutil.copy(photo, folder)
    return folder


class StepClock:
    """Adds up the seconds of parts of our training step, from the end of the early steps on.

    Calls return when their work is done on a CPU; on a GPU they do not.
    """

    def __init__(self):
        self.seconds: dict[str, float] = defaultdict(float)
        self.start = self.end = 0.0

    def timed(self, part: str, function: Callable) -> Callable:
        """The function, its time added to a part's."""

        def run(*arguments, **options):
            start = time.perf_counter()
            result = function(*arguments, **options)
            self.seconds[part] += time.perf_counter() - start
            return result

        return run

    def progress(self, report: StepReport) -> None:
        """Hear that a step has ended."""
        self.end = time.perf_counter()
        if report.step <= EARLY:
            self.seconds.clear()
            self.start = self.end


def step_parts(case: Case, folder: Path) -> dict[str, float]:
    """Milliseconds of the parts of our mean step, run in this process, and the data's share."""
    clock = StepClock()
    own = {"photos": str(case.photos), "base": str(case.base), "steps": case.steps}
    plan = plan_training(configure(CONCEPT | own, str(preset(case, folder))))
    with ExitStack() as stack:
        for part, (owner, name) in PARTS.items():
            timed = clock.timed(part, getattr(owner, name))
            stack.enter_context(mock.patch.object(owner, name, timed))
        run_training(plan, folder / "run", clock.progress)
    per_step = 1e3 / (case.steps - EARLY)
    total = (clock.end - clock.start) * per_step
    parts = {part: clock.seconds[part] * per_step for part in PARTS}
    figures = parts | {"rest": total - sum(parts.values()), "total": total}
    shown = {name: round(value, 2) for name, value in figures.items()}
    return shown | {"data_share": round(parts["data"] / total, 4)}


def spread(values: list[float]) -> dict[str, float]:
    """Least, median and greatest value."""
    figures = {"min": min(values), "median": statistics.median(values), "max": max(values)}
    return {name: round(value, 3) for name, value in figures.items()}


def measure_round(case: Case, peer: Path, ours_first: bool, folder: Path) -> dict[str, dict]:
    """What was seen of both sides, one after the other."""
    sides = {"ours": run_ours, "peer": lambda case, place: run_peer(peer, case, place)}
    seen = {}
    for side in sorted(sides, reverse=not ours_first):
        seen[side] = asdict(sides[side](case, Path(tempfile.mkdtemp(dir=folder))))
        print(f"  {side} {seen[side]['images_per_second']:.3f} images/s", flush=True)
    return seen


def summary(rounds: list[dict[str, dict]]) -> dict:
    """Figures of both sides over the rounds, and the rounds' ratios."""
    speeds = [[seen[side]["images_per_second"] for side in ("ours", "peer")] for seen in rounds]
    sides = {
        side: {key: spread([seen[side][key] for seen in rounds]) for key in rounds[0][side]}
        for side in ("ours", "peer")
    }
    return {"ratio": spread([ours / peer for ours, peer in speeds]), **sides}


def cases(wanted: argparse.Namespace, folder: Path) -> dict[str, Case]:
    """Every wanted model, its text encoder trained along or frozen as wanted."""
    photos, found = copied_photos(folder / "photos"), {}
    for model in wanted.models:
        resolution, batch, steps = MODELS[model]
        base = POCKET if model == "pocket" else half_width_sd15(folder / model)
        sizes = (resolution, batch, steps, wanted.rank, wanted.precision)
        for state in wanted.text_encoder:
            case = Case(base, photos, *sizes, text_encoder=state == "trained")
            found[f"{model}, text encoder {state}"] = case
    return found


def earlier(setup: dict) -> dict[str, dict]:
    """The results that were measured alike before."""
    path = RESULTS / f"{NAME}.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    return known["results"] if known.get("setup") == setup else {}


def command_line() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", type=Path, required=True, help="train_dreambooth_lora.py")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--text-encoder", nargs="+", default=list(TEXT), choices=TEXT)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--precision", default="fp32", choices=PRECISIONS)
    return parser.parse_args()


def main() -> None:
    """Measure and write the result."""
    wanted = command_line()
    setup = {
        "peer_sha256": hashlib.sha256(wanted.peer.read_bytes()).hexdigest(),
        "versions": {package: version(package) for package in PACKAGES},
        "rank": wanted.rank,
        "precision": wanted.precision,
        "models": {name: dict(zip(SIZES, sizes, strict=True)) for name, sizes in MODELS.items()},
    }
    results = earlier(setup)
    with tempfile.TemporaryDirectory() as name:
        for words, case in cases(wanted, Path(name)).items():
            print(f"{words}: {case.resolution} pixels, batch {case.batch}", flush=True)
            rounds = results.get(words, {}).get("rounds", [])
            for _ in range(wanted.rounds):
                rounds.append(measure_round(case, wanted.peer, len(rounds) % 2 == 0, Path(name)))
                results[words] = {**results.get(words, {}), **summary(rounds), "rounds": rounds}
                write_result(NAME, {"setup": setup, "results": results})
            parts = step_parts(case, Path(tempfile.mkdtemp(dir=name)))
            results[words]["our_step_ms"] = parts
            write_result(NAME, {"setup": setup, "results": results})
            print(f"  ratio {results[words]['ratio']}\n  our step in ms {parts}", flush=True)


if __name__ == "__main__":
    main()
