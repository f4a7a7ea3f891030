"""What `gram` and Mix-of-Show's gradient fusion cost at Stable Diffusion 1.5's shapes.

`python benchmarks/fusion_cost.py --concepts 3` takes the attention layers of the UNet's denoiser at
512 x 512 pixels with random features: 20 steps of one picture per concept, as Mix-of-Show collects.
Both methods get the same features, in the same chunks:

    gram      adds each chunk to a Gram matrix as it comes, then solves the normal equations
    gradient  keeps all chunks in half precision, then runs 50 L-BFGS iterations on them

Each of the layers' distinct shapes is measured once in a process of its own, and counted as often
as the network has it: seconds add up; memory is the features or Gram matrices of all layers, which
must be there at once, plus the largest peak of one layer's fusion. Writes results/fusion_cost.json.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from dataclasses import dataclass

import torch
from machine import write_result

from rite_diffusion.fusion.gram import gram
from rite_diffusion.fusion.layer import Factors, Layer, Part
from rite_diffusion.fusion.settings import FusionSettings
from rite_diffusion.fusion.statistics import ExactSum

RANK, STEPS, CHUNK = 4, 20, 4096


@dataclass(frozen=True)
class Shape:
    """Attention layers with inputs (rows per step, width); their outputs have the same width."""

    rows: int
    width: int
    inputs: int  # distinct inputs of this shape: self q/k/v share one, then self out, q, out
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
        parts.append(Part(str(concept), random_factors(shape, concept), total.gram()))
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
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    update, seconds = {"gram": by_gram, "gradient": by_gradient}[method](shape, concepts)
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"seconds": seconds, "peak_mb": peak, "loss": loss_of(update, shape, concepts)}


def kept_mb(method: str, concepts: int) -> float:
    """Megabytes of what all layers must keep while the pictures are drawn."""
    total = 0
    for shape in SHAPES.values():
        rows = shape.rows * STEPS if method == "gradient" else shape.width
        size = 2 if method == "gradient" else 8  # bytes: half precision, double precision
        total += shape.inputs * rows * shape.width * size
    return total * concepts / 2**20


def main() -> None:
    """Measure every shape with both methods."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--concepts", type=int, default=3)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--one", nargs=2, metavar=("METHOD", "SHAPE"), help="of the inner process")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(*options.one, options.concepts)))
        return
    table: dict[str, dict] = {}
    for method in ("gram", "gradient"):
        table[method] = {"shapes": {}, "kept_mb": round(kept_mb(method, options.concepts))}
        for name in options.shapes:
            command = [sys.executable, __file__, "--concepts", str(options.concepts)]
            done = subprocess.run(
                [*command, "--one", method, name], capture_output=True, text=True, check=True
            )
            table[method]["shapes"][name] = json.loads(done.stdout)
            print(method, name, done.stdout.strip(), flush=True)
        each = table[method]["shapes"]
        table[method]["seconds"] = sum(SHAPES[n].layers * one["seconds"] for n, one in each.items())
        table[method]["memory_mb"] = table[method]["kept_mb"] + max(
            one["peak_mb"] for one in each.values()
        )
    write_result("fusion_cost", {"concepts": options.concepts, "methods": table})


if __name__ == "__main__":
    main()
