"""SD1.5 and SDXL at their true shapes with random weights: train, save, load elsewhere, draw.

`python benchmarks/full_size.py` writes results/full_size.json: seconds and peak memory of one
training step at reduced resolution for every combination of precision, gradient checkpointing and
cached text states, and of a picture of two steps in each precision; every one in a process of its
own. It also loads an adapter in plain diffusers and compares delta W there. SDXL in fp32 needs some
16 GB of memory, its folder 7 GB of disk; `--tiny` runs the same code on models of small widths.
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from machine import memory_mib, write_result

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline  # noqa: E402

from models import (  # noqa: E402
    tiny_stable_diffusion,
    tiny_stable_diffusion_xl,
    true_stable_diffusion_15,
    true_stable_diffusion_xl,
)
from rite_diffusion.adapters import Adapter, AdapterInfo, load_adapter, save_adapter
from rite_diffusion.adapters.attach import attach
from rite_diffusion.adapters.verify import verify_in_diffusers  # noqa: E402
from rite_diffusion.backbones.source import load_backbone  # noqa: E402
from rite_diffusion.generation.denoise import sample  # noqa: E402
from rite_diffusion.methods import PlainLora  # noqa: E402
from rite_diffusion.training.settings import configure  # noqa: E402
from rite_diffusion.training.trainer import build_optimizer  # noqa: E402

BUILDERS = {
    "sd15": (true_stable_diffusion_15, tiny_stable_diffusion),
    "sdxl": (true_stable_diffusion_xl, tiny_stable_diffusion_xl),
}


def peak_mib() -> int:
    """Largest memory since the last call: the GPU's where there is one, else the process's."""
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated() / 2**20
        torch.cuda.reset_peak_memory_stats()
        return round(peak)
    peak = memory_mib("self", "VmHWM")
    Path("/proc/self/clear_refs").write_text("5")  # its peak starts anew (man 5 proc)
    return round(peak)


def train_step(folder: Path, case: dict, out: Path) -> dict:
    """One training step on random latents; the adapter is saved to `out`."""
    start = time.perf_counter()
    backbone = load_backbone(str(folder), case["precision"])
    settings = {"photos": "-", "trigger": "<t>", "class_noun": "toy", "base": str(folder)}
    # Cached text states stand for a frozen text encoder: it is encoded once and then dropped.
    settings |= {"lora": {"rank": 8, "text_encoder": not case["cached_text"]}}
    method = PlainLora(backbone, configure(settings, "sd15"))
    optimizer = build_optimizer(method, method.config)
    backbone.checkpoint_gradients(case["checkpointing"])
    side = case["pixels"] // backbone.pixels_per_latent
    latents = torch.randn(1, backbone.latent_channels, side, side, device=backbone.device)
    conditioning = method.conditioning(["a <t>"])
    if case["cached_text"]:  # neither text encoders nor autoencoder are needed any more
        backbone.release(["vae", *(backbone.components.keys() - {"unet"})])
    loaded, load_peak = time.perf_counter(), peak_mib()
    prediction = backbone.denoise(
        latents, torch.tensor([500], device=backbone.device), conditioning
    )
    prediction.float().square().mean().backward()
    optimizer.step()
    seconds = time.perf_counter() - loaded
    pairs = method.pairs()
    save_adapter(out, Adapter(pairs, AdapterInfo(trigger="<t>")))
    return {
        "load_seconds": round(loaded - start, 2),
        "load_peak_mib": load_peak,
        "step_seconds": round(seconds, 2),
        "step_peak_mib": peak_mib(),
        "modules": len(pairs),
        "modules_that_moved": sum(bool(pair.up.any()) for pair in pairs),
    }


def draw(folder: Path, case: dict, out: Path) -> dict:
    """A picture of two steps with the adapter."""
    backbone = load_backbone(str(folder), case["precision"])
    attach(backbone, load_adapter(out), "trained")
    peak_mib()
    start, side = time.perf_counter(), case["pixels"]
    sample(backbone, ["a <t>"], [0], steps=2, width=side, height=side)
    return {"seconds": round(time.perf_counter() - start, 2), "peak_mib": peak_mib()}


def load_elsewhere(folder: Path, case: dict, out: Path) -> dict:
    """The adapter in plain diffusers: every module found, none left over."""
    xl = "StableDiffusionXL" in (folder / "model_index.json").read_text()
    kind = StableDiffusionXLPipeline if xl else StableDiffusionPipeline
    pipeline = kind.from_pretrained(folder, torch_dtype=torch.float32)
    check = verify_in_diffusers(load_adapter(out), out, pipeline)
    return {"modules": check.modules, "largest_relative_difference": check.difference}


def build(folder: Path, case: dict, out: Path) -> dict:
    """Write the case's model with random weights as a diffusers folder, in half precision."""
    BUILDERS[case["model"]][case["tiny"]]().to(torch.float16).save_pretrained(folder)
    return {}


TASKS = {"build": build, "train": train_step, "draw": draw, "load": load_elsewhere}


def measured(task: str, folder: Path, case: dict, out: Path) -> dict:
    """What a task returned that ran in a process of its own."""
    command = [sys.executable, __file__, "--task", task, "--folder", str(folder)]
    command += ["--case", json.dumps(case), "--out", str(out)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(model: str, tiny: bool, pixels: int) -> dict:
    """All figures of a model."""
    with tempfile.TemporaryDirectory() as name:
        folder, out = Path(name) / model, Path(name) / "adapter.safetensors"
        measured("build", folder, {"model": model, "tiny": tiny}, out)
        steps = [case | measured("train", folder, case, out) for case in cases(pixels)]
        # The last case has no text encoder in it; the adapter of all components is the first's.
        measured("train", folder, cases(pixels)[0], out)
        draws = [{"precision": p, "pixels": pixels} for p in ("fp32", "bf16")]
        return {
            "steps": steps,
            "in_diffusers": measured("load", folder, {}, out),
            "pictures": [case | measured("draw", folder, case, out) for case in draws],
        }


def main() -> None:
    """Measure everything, or do one task of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(BUILDERS), choices=BUILDERS)
    parser.add_argument("--pixels", type=int, default=128)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--task", choices=TASKS)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--case", type=json.loads)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.task:
        print(json.dumps(TASKS[options.task](options.folder, options.case, options.out)))
        return
    figures = {model: measure(model, options.tiny, options.pixels) for model in options.models}
    print(json.dumps(figures, indent=2))
    if not options.tiny:
        write_result("full_size", figures)


def cases(pixels: int) -> list[dict]:
    """Every combination that is measured."""
    names = ("precision", "checkpointing", "cached_text")
    values = itertools.product(("fp32", "bf16"), (False, True), (False, True))
    return [dict(zip(names, each, strict=True)) | {"pixels": pixels} for each in values]


if __name__ == "__main__":
    main()
