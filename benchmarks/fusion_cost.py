"""What `gram` and Mix-of-Show's gradient fusion cost at Stable Diffusion 1.5's shapes.

`python benchmarks/fusion_cost.py --concepts 3` takes the attention layers of the UNet's denoiser at
512 x 512 pixels with random features: 20 steps of one picture per concept, as Mix-of-Show collects.
Both methods get the same features, in the same chunks:

    gram      adds each chunk to a Gram matrix as it comes, then solves the normal equations
    gradient  keeps all chunks in half precision, then runs 50 L-BFGS iterations on them

Each of the layers' distinct shapes is measured once in a process of its own, and counted as often
as the network has it: seconds add up; memory is what all layers must keep while pictures are drawn
(for gradient, features of every layer, or of every distinct input, as q, k and v share theirs; for
gram, Gram matrices of the concepts and the base, and the running sums of the one being drawn) plus
the largest peak of one layer's fusion. `--shapes` measures some, and adds them to
results/fusion_cost.json.
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass

import torch
from machine import RESULTS, memory_mib, write_result

from rite_diffusion.files.writing import read_json
from rite_diffusion.fusion.layer import Factors, Layer, Part
from rite_diffusion.fusion.methods.gram import gram
from rite_diffusion.fusion.settings import FusionSettings
from rite_diffusion.fusion.statistics import ExactSum

RANK, STEPS, CHUNK = 4, 20, 4096


@dataclass(frozen=True)
class Shape:
    """Attention layers with inputs (rows per step, width); their outputs have the same width."""

    rows: int
    width: int
    inputs: int  # distinct ones: self q, k and v share theirs, then self out, cross q, cross out
    layers: int


SHAPES = {  # 5 blocks with cross-attention at each resolution, 1 at the lowest
    "64x64": Shape(4096, 320, 5 * 4, 5 * 6),
    "32x32": Shape(1024, 640, 5 * 4, 5 * 6),
    "16x16": Shape(256, 1280, 5 * 4, 5 * 6),
    "8x8": Shape(64, 1280, 4, 6),
}


def features(shape: Shape, concept: int, step: int) -> torch.Tensor:
    """One step's random inputs (rows, width), of unequal directions that concepts share in part."""
    draws = torch.Generator().manual_seed(1000 * concept + step)
    mixing = torch.Generator().manual_seed(concept)
    loud = torch.logspace(0, -2, shape.width)[torch.randperm(shape.width, generator=mixing)]
    return torch.randn(shape.rows, shape.width, generator=draws) * loud


def random_factors(shape: Shape, concept: int) -> Factors:
    """A random update of rank RANK."""
    draws = torch.Generator().manual_seed(concept)
    up = torch.randn(shape.width, RANK, generator=draws).double()
    return Factors(up, torch.randn(RANK, shape.width, generator=draws).double() / shape.width**0.5)


def loss_of(update: torch.Tensor, shape: Shape, concepts: int) -> float:
    """Sum over concepts of the mean squared output error of an update (width, width)."""
    total = 0.0
    for concept in range(concepts):
        off = (update - random_factors(shape, concept).dense()).float()
        for step in range(STEPS):
            total += (features(shape, concept, step) @ off.mT).square().sum().item()
    return total / (shape.rows * STEPS)


def by_gram(shape: Shape, concepts: int) -> tuple[torch.Tensor, float]:
    """The fused update and the seconds that one layer takes, its features not counted."""
    parts, seconds = [], 0.0
    for concept in range(concepts):
        total = ExactSum(shape.width, torch.device("cpu"))
        for step in range(STEPS):
            chunk = features(shape, concept, step)
            start = time.perf_counter()
            total.add(chunk)
            seconds += time.perf_counter() - start
        start = time.perf_counter()
        parts.append(Part(str(concept), random_factors(shape, concept), total.second_moment()))
        seconds += time.perf_counter() - start
    start = time.perf_counter()
    fused = gram(Layer("x", parts, None), FusionSettings(ridge=1e-6)).dense()
    return fused, seconds + time.perf_counter() - start


def by_gradient(shape: Shape, concepts: int) -> tuple[torch.Tensor, float]:
    """The same by L-BFGS on stored features, as Mix-of-Show's release does."""
    stored, seconds = [], 0.0
    for concept in range(concepts):
        chunks = [features(shape, concept, step).half() for step in range(STEPS)]
        stored.append((torch.cat(chunks), random_factors(shape, concept).dense().float()))
    start = time.perf_counter()
    inputs = torch.cat([rows for rows, _ in stored]).float()
    outputs = torch.cat([rows.float() @ update.mT for rows, update in stored])
    fused = torch.zeros(shape.width, shape.width, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [fused], lr=1, max_iter=50, history_size=25, line_search_fn="strong_wolfe",
        tolerance_grad=1e-16, tolerance_change=1e-16,
    )  # fmt: skip
    best = (float("inf"), fused.detach().clone())

    def closure() -> torch.Tensor:
        nonlocal best
        optimizer.zero_grad()
        loss = (inputs @ fused.mT - outputs).square().mean()
        loss.backward()
        if loss.item() < best[0]:
            best = loss.item(), fused.detach().clone()
        return loss

    optimizer.step(closure)
    seconds += time.perf_counter() - start
    return best[1], seconds


def measure(method: str, shape_name: str, concepts: int) -> dict:
    """Seconds, peak memory beyond the start and loss of one layer; run in its own process."""
    shape = SHAPES[shape_name]
    features(shape, 0, 0)
    before = memory_mib("self", "VmHWM")
    update, seconds = {"gram": by_gram, "gradient": by_gradient}[method](shape, concepts)
    peak = memory_mib("self", "VmHWM") - before
    return {"seconds": seconds, "peak_mb": peak, "loss": loss_of(update, shape, concepts)}


def kept_mb(what: str, concepts: int) -> float:
    """Megabytes of what all layers must keep while the pictures are drawn."""
    total = 0
    for shape in SHAPES.values():
        if what == "gram":  # halves of the matrices in single precision, one whole in double
            entries = shape.width * (shape.width + 1) // 2
            total += shape.inputs * (4 * entries * (concepts + 1) + 8 * shape.width**2)
        else:  # features in half precision
            copies = shape.layers if what == "features per layer" else shape.inputs
            total += copies * shape.rows * STEPS * shape.width * 2 * concepts
    return total / 2**20


def in_own_process(method: str, shape: str, concepts: int) -> dict:
    """`measure` in a fresh process, whose memory is its own."""
    command = [sys.executable, __file__, "--concepts", str(concepts), "--one", method, shape]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    print(method, shape, done.stdout.strip(), flush=True)
    return json.loads(done.stdout)


def totals(shapes: dict, concepts: int) -> dict:
    """The whole network's seconds, megabytes and loss by method, from its shapes' figures."""
    found: dict = {}
    for method, kept in (("gram", ["gram"]), ("gradient", ["features per layer", "features once"])):
        each = {name: shapes[name][method] for name in SHAPES}
        peak = max(one["peak_mb"] for one in each.values())
        found[method] = {
            "seconds": sum(SHAPES[name].layers * one["seconds"] for name, one in each.items()),
            "memory_mb": {what: kept_mb(what, concepts) + peak for what in kept},
            "loss": sum(SHAPES[name].layers * one["loss"] for name, one in each.items()),
        }
    gram, gradient = found["gram"], found["gradient"]
    found["faster"] = gradient["seconds"] / gram["seconds"]
    found["less_memory"] = {
        what: mb / gram["memory_mb"]["gram"] for what, mb in gradient["memory_mb"].items()
    }
    found["loss_ratio"] = gram["loss"] / gradient["loss"]
    return found


def main() -> None:
    """Measure shapes with both methods, and add up when all are there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--concepts", type=int, default=3)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--one", nargs=2, metavar=("METHOD", "SHAPE"), help="of the inner process")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(*options.one, options.concepts)))
        return
    earlier = read_json(RESULTS / "fusion_cost.json")
    same = earlier.get("concepts") == options.concepts
    shapes = earlier["shapes"] if same else {}
    for name in options.shapes:
        shapes[name] = {
            method: in_own_process(method, name, options.concepts)
            for method in ("gram", "gradient")
        }
        result = {"concepts": options.concepts, "rank": RANK, "shapes": shapes}
        if shapes.keys() >= SHAPES.keys():
            result["network"] = totals(shapes, options.concepts)
        write_result("fusion_cost", result)


if __name__ == "__main__":
    main()
