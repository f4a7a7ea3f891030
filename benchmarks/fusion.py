"""What fusing costs: identity, leaks, binding, drift, seconds and bytes, per method.

`python benchmarks/fusion.py` learns the example concepts on the pocket base with each way of
learning and training seed, fuses 2, 3 and 4 of them with every method, and has the judge look at
the pictures: is the asked concept there (identity, recognised), is another one there instead
(leak), do two concepts of one prompt sit where they were asked for (binding, with regions and
without), and how far do pictures without triggers move (drift). Each finished fusion is a line of
results/fusion.jsonl; started again, it does what is missing. At the end (or with --report alone) it
writes results/fusion.json and .png. `benchmarks/fusion_cost.py` measures time and memory at Stable
Diffusion 1.5's shapes.
"""

import argparse
import json
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from concepts import CONCEPTS
from fusion_pictures import attach_all, base, binding, concept_scores, other_pictures
from machine import RESULTS, write_result

from rite_diffusion import merging, recipes
from rite_diffusion.adapters import detach, load_adapter
from rite_diffusion.demo import example_photos
from rite_diffusion.evaluation.judge import load_judge
from rite_diffusion.generation.regional import Attached

METHODS = {  # label -> method, weight of every adapter, settings
    "sum": ("concat", 1.0, {}),
    "sum 0.6": ("concat", 0.6, {}),
    "average": ("weighted", None, {}),  # None: one over the number of adapters
    "ties": ("ties", 1.0, {}),
    "dare": ("dare", 0.6, {}),
    "knots": ("knots", 1.0, {}),
    "custom_diffusion": ("custom_diffusion", 1.0, {}),
    "gradient": ("gradient", 1.0, {}),
    "gram": ("gram", 1.0, {}),
    "gram, half rank": ("gram", 1.0, {"rank": "half"}),
}
ALONE = "alone"  # every concept by its own adapter: what fusing can lose
ATTACHED = "side by side"  # the adapters unfused, for the pictures with regions
COUNTS = (2, 3, 4)
FIGURES = ("identity", "recognised", "leak", "binding", "binding_regions", "drift", "seconds", "mb")
LOG = RESULTS / "fusion.jsonl"
CACHE = Path("runs/benchmark_fusion")


@dataclass(frozen=True)
class Task:
    """One fusion to measure."""

    learner: str
    seed: int
    count: int
    method: str

    def concepts(self) -> list[str]:
        """Which concepts: a window that moves on with the seed."""
        names = list(CONCEPTS)
        return [names[(self.seed + i) % len(names)] for i in range(self.count)]


# --- adapters ----------------------------------------------------------------------------------


def trained(learner: str, concept: str, seed: int, settings: dict) -> Path:
    """A concept's adapter file, with its sketch; learned now unless the cache has it."""
    folder = CACHE / f"{learner}-{concept}-{seed}"
    path = folder / "adapter.safetensors"
    wanted = {
        "photos": str(example_photos(concept)),
        "trigger": f"<{concept}>",
        "class_noun": CONCEPTS[concept][0],
        "method": learner,
        "seed": seed,
        "previews": {"every": 0},
    }
    if not path.exists():
        recipes.run_training(recipes.plan_training(recipes.configure(wanted | settings)), folder)
    if not path.with_suffix(".sketch.safetensors").exists():
        merging.sketch(path, directions=256)
    return path


def fused(task: Task, files: list[Path]) -> tuple[list[Path], list[float], float]:
    """Adapter files to attach with their weights, and the seconds that fusing took."""
    if task.method in (ALONE, ATTACHED):
        return files, [1.0] * len(files), 0.0
    method, weight, settings = METHODS[task.method]
    weight = 1 / len(files) if weight is None else weight
    if settings.get("rank") == "half":
        ranks = [max(load_adapter(path).ranks()) for path in files]
        settings = {"rank": max(1, sum(ranks) // 2)}
    out = CACHE / "fused.safetensors"
    start = time.perf_counter()
    merging.fuse([f"{path}:{weight}" for path in files], method=method, out=out, **settings)
    return [out], [1.0], time.perf_counter() - start


# --- measuring ---------------------------------------------------------------------------------


def measure(task: Task, seeds: list[int], settings: dict) -> dict:
    """The task with its figures, means over its concepts."""
    concepts = task.concepts()
    files = [trained(task.learner, name, task.seed, settings) for name in concepts]
    adapters, weights, seconds = fused(task, files)
    if task.method == ALONE:
        each = [
            look([f], [1.0], [n], concepts, seeds) for f, n in zip(files, concepts, strict=True)
        ]
        figures = {key: statistics.mean(one[key] for one in each) for key in each[0]}
    else:
        figures = look(adapters, weights, concepts, concepts, seeds)
        figures |= two_concepts(adapters, weights, concepts, 4 * len(seeds))
    size = sum(path.stat().st_size for path in adapters) / 1e6
    figures |= {"seconds": seconds, "mb": size}
    return vars(task) | {key: round(value, 4) for key, value in figures.items()}


@contextmanager
def attached(files: list[Path], weights: list[float]) -> Iterator[list[Attached]]:
    """The adapters in the base, until the block ends."""
    found = attach_all(files, weights)
    try:
        yield found
    finally:
        for each in found:
            detach(base(), each.name)


def look(
    files: list[Path], weights: list[float], asked: list[str], known: list[str], seeds: list[int]
) -> dict[str, float]:
    """Mean scores of the asked concepts and the drift of other pictures, with these adapters."""
    before = other_pictures()
    with attached(files, weights):
        scores = [
            concept_scores(name, [other for other in known if other != name], seeds)
            for name in asked
        ]
        drift = (other_pictures() - before).square().mean().sqrt().item()
    return {key: statistics.mean(s[key] for s in scores) for key in scores[0]} | {"drift": drift}


def two_concepts(
    files: list[Path], weights: list[float], concepts: list[str], pictures: int
) -> dict[str, float]:
    """Binding in prompts of the first two concepts."""
    with attached(files, weights) as found:
        return binding(concepts, found, list(range(200, 200 + pictures)))


# --- figures -----------------------------------------------------------------------------------


def interval(values: list[float], draws: int = 2000) -> list[float]:
    """Mean and bootstrap 95 % interval over training seeds."""
    rng = random.Random(0)
    means = sorted(statistics.mean(rng.choices(values, k=len(values))) for _ in range(draws))
    edges = means[int(0.025 * draws)], means[int(0.975 * draws)]
    return [round(value, 4) for value in (statistics.mean(values), *edges)]


def report(rows: list[dict]) -> dict:
    """Learner -> number of concepts -> method -> figure -> mean and 95 % interval."""
    table: dict = defaultdict(lambda: defaultdict(dict))
    for learner, count, method in sorted({(r["learner"], r["count"], r["method"]) for r in rows}):
        own = [
            r for r in rows if (r["learner"], r["count"], r["method"]) == (learner, count, method)
        ]
        figures = {key: interval([r[key] for r in own]) for key in FIGURES if key in own[0]}
        table[learner][count][method] = figures | {"seeds": len(own)}
    return table


def plot(table: dict, path: Path) -> None:
    """Identity over the number of concepts, one panel per way of learning."""
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        1, len(table), figsize=(6 * len(table), 4.2), layout="constrained", squeeze=False
    )
    for axes, (learner, by_count) in zip(panels[0], table.items(), strict=True):
        for method in (ALONE, *METHODS):
            points = [(n, *m[method]["identity"]) for n, m in by_count.items() if method in m]
            if points:
                n, middle, low, high = zip(*points, strict=True)
                [line] = axes.plot(n, middle, marker="o", markersize=4, label=method)
                axes.fill_between(n, low, high, color=line.get_color(), alpha=0.12)
        axes.set(title=learner, xlabel="concepts in the file", ylabel="identity", xticks=COUNTS)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def finished() -> list[dict]:
    """The fusions in the log."""
    return [json.loads(line) for line in LOG.read_text().splitlines()] if LOG.exists() else []


def main() -> None:
    """Measure what is missing, then write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--learners", nargs="+", default=["lora"], help="ways of learning")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="training seeds")
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS)
    parser.add_argument("--methods", nargs="+", default=[ALONE, ATTACHED, *METHODS])
    parser.add_argument("--pictures", type=int, default=4, help="per prompt")
    parser.add_argument("--steps", type=int, help="of training; default: the preset's")
    parser.add_argument("--report", action="store_true", help="only write the figures")
    options = parser.parse_args()
    settings = {"steps": options.steps} if options.steps else {}
    tasks = [
        Task(learner, seed, count, method)
        for seed in options.seeds
        for learner in options.learners
        for count in options.counts
        for method in options.methods
    ]
    done = {tuple(row[key] for key in vars(tasks[0])) for row in finished()}
    seeds = list(range(100, 100 + options.pictures))
    RESULTS.mkdir(exist_ok=True)
    for task in [] if options.report else tasks:
        if tuple(vars(task).values()) in done:
            continue
        row = measure(task, seeds, settings)
        with LOG.open("a") as log:
            log.write(json.dumps(row) + "\n")
        print(row, flush=True)
    table = report(finished())
    write_result("fusion", {"judge": load_judge().accuracy, "figures": table})
    plot(table, RESULTS / "fusion.png")


if __name__ == "__main__":
    main()
