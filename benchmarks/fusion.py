"""What fusing costs: identity, leaks, binding, drift, seconds and bytes, per method.

`python benchmarks/fusion.py` learns the example concepts on the pocket base with each way of
learning and training seed, fuses 2, 3 and 4 of them with every method, and has the judge look at
the pictures: is the asked concept there (identity, recognised), is another one there instead
(leak), do two concepts of one prompt sit where they were asked for (binding, with regions and
without), and how far do pictures without triggers move (drift). Adapters stay in the cache
(`RITE_CACHE`) and each finished fusion is a line of results/fusion.jsonl: started again, it does
what is missing, and with `--minutes` it stops in between; `--part 0 2` and `--part 1 2` are two
processes that share the work. In the end (or with --report alone) it
writes results/fusion.json and .png. `benchmarks/fusion_cost.py` measures time and memory at Stable
Diffusion 1.5's shapes.
"""

import argparse
import json
import random
import statistics
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from fusion_pictures import (
    PRECISION,
    binding,
    concept_pictures,
    distance,
    in_base,
    other_pictures,
    pictures_alone,
    scores,
)
from machine import RESULTS, write_result
from PIL.Image import Image
from prompts import CONCEPTS

from rite_diffusion.adapters import load_adapter
from rite_diffusion.api import fuse as merging
from rite_diffusion.api import sketch as sketching
from rite_diffusion.api.demo import example_photos
from rite_diffusion.evaluation.judge import load_judge
from rite_diffusion.files.writing import cache_folder
from rite_diffusion.fusion.members import Member
from rite_diffusion.fusion.report import report_on
from rite_diffusion.fusion.sketch import load_sketch, sketch_path
from rite_diffusion.training.plan import plan_training
from rite_diffusion.training.run import run_training
from rite_diffusion.training.run_folder import RunFolder
from rite_diffusion.training.settings import configure

METHODS = {  # label -> method, weight of every adapter, settings
    "sum": ("concat", 1.0, {}),
    "sum 0.6": ("concat", 0.6, {}),
    "average": ("weighted", None, {}),  # None: one over the number of adapters
    "svd, half rank": ("svd", 1.0, {"rank": "half"}),
    "ties": ("ties", 1.0, {}),
    "dare": ("dare", 1.0, {}),
    "knots": ("knots", 1.0, {}),
    "custom_diffusion": ("custom_diffusion", 1.0, {}),
    "gradient": ("gradient", 1.0, {}),
    "gram": ("gram", 1.0, {}),
    "gram, refined": ("gram", 1.0, {"refine": 1}),
    "gram, half rank": ("gram", 1.0, {"rank": "half"}),
}
ALONE = "alone"  # every concept by its own adapter: what fusing can lose
ATTACHED = "side by side"  # the adapters unfused, each in its own region
CHIEF = (ALONE, ATTACHED, "sum", "average", "gram", "gram, refined")
COUNTS = (2, 3, 4)
COLOURS = {  # of the plot; the other methods are grey
    ALONE: "#404040", "gram": "#3563a5", "gram, refined": "#24477a", "sum": "#c28f4e",
    "average": "#a83f4c",
}  # fmt: skip
FIGURES = """identity recognised leak binding binding_regions drift error seconds mb""".split()
LOG = RESULTS / "fusion.jsonl"


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


def trained(learner: str, concept: str, seed: int) -> Path:
    """A concept's adapter file, with its sketch; learned now unless the cache has it."""
    folder = cache_folder() / "benchmark_fusion" / f"{learner}-{concept}-{seed}"
    path = folder / "adapter.safetensors"
    wanted = {
        "photos": str(example_photos(concept)),
        "trigger": f"<{concept}>",
        "class_noun": CONCEPTS[concept][0],
        "method": learner,
        "seed": seed,
        "precision": PRECISION,
        "previews": {"every": 0},
    }
    if RunFolder(folder).state() != "finished":
        run_training(plan_training(configure(wanted)), folder)
    if not path.with_suffix(".sketch.safetensors").exists():
        sketching.sketch(path, directions=256)
    return path


def fused(task: Task, files: list[Path], folder: Path) -> tuple[list[Path], float]:
    """The adapter files to attach, and the seconds that fusing took; statistics lie in sketches."""
    if task.method in (ALONE, ATTACHED):
        return files, 0.0
    method, weight, settings = METHODS[task.method]
    weight = 1 / len(files) if weight is None else weight
    if settings.get("rank") == "half":
        settings = {"rank": max(1, sum(max(load_adapter(p).ranks()) for p in files) // 2)}
    out = folder / "fused.safetensors"
    start = time.perf_counter()
    items = [f"{path}:{weight}" for path in files]
    merging.fuse(items, method=method, out=out, allow_loss=True, **settings)
    return [out], time.perf_counter() - start


# --- measuring ---------------------------------------------------------------------------------


def measure(task: Task, seeds: tuple[int, ...]) -> dict:
    """The task with its figures, means over its concepts."""
    concepts = task.concepts()
    files = [trained(task.learner, name, task.seed) for name in concepts]
    with TemporaryDirectory() as folder:
        adapters, seconds = fused(task, files, Path(folder))
        size = sum(path.stat().st_size for path in adapters) / 1e6
        figures = {"seconds": seconds, "mb": size} | look(task, adapters, seeds)
        if task.method in METHODS:
            figures["error"] = error_told(files, adapters[0])
    return vars(task) | {key: round(value, 4) for key, value in figures.items()}


def error_told(files: list[Path], result: Path) -> float:
    """The error of the concepts' outputs that the conflict report tells, their mean."""
    members = [
        Member(load_adapter(path), 1.0, path, load_sketch(sketch_path(path))) for path in files
    ]
    return statistics.mean(report_on(members, load_adapter(result)).after)


def look(task: Task, adapters: list[Path], seeds: tuple[int, ...]) -> dict[str, float]:
    """What the judge makes of pictures with the adapters."""
    concepts, pair_seeds = task.concepts(), list(range(200, 216))
    if task.method == ALONE:
        each = [
            pictures_alone(file, name, seeds) for file, name in zip(adapters, concepts, strict=True)
        ]
        return mean_scores(concepts, each)
    before = other_pictures()
    with in_base(adapters) as attached:
        found = binding(concepts, attached, pair_seeds)
        if task.method == ATTACHED:  # all else is as with the sum
            return {"binding_regions": found["binding_regions"]}
        drift = distance(other_pictures(), before)
        each = [concept_pictures(name, seeds) for name in concepts]
    return mean_scores(concepts, each) | found | {"drift": drift}


def mean_scores(concepts: list[str], drawn: list[list[Image]]) -> dict[str, float]:
    """The scores of each concept's pictures, averaged."""
    each = [
        scores(name, [other for other in concepts if other != name], own)
        for name, own in zip(concepts, drawn, strict=True)
    ]
    return {key: statistics.mean(one[key] for one in each) for key in each[0]}


# --- figures -----------------------------------------------------------------------------------


def interval(values: list[float], draws: int = 2000) -> list[float]:
    """Mean and bootstrap 95 % interval over training seeds."""
    rng = random.Random(0)
    means = sorted(statistics.mean(rng.choices(values, k=len(values))) for _ in range(draws))
    edges = means[int(0.025 * draws)], means[int(0.975 * draws)]
    return [round(value, 4) for value in (statistics.mean(values), *edges)]


def table_of(rows: list[dict]) -> dict:
    """Learner -> number of concepts -> method -> figure -> mean and 95 % interval."""
    table: dict = defaultdict(lambda: defaultdict(dict))
    groups: dict[tuple, list[dict]] = defaultdict(list)
    for row in rows:
        groups[row["learner"], row["count"], row["method"]].append(row)
    order = [ALONE, ATTACHED, *METHODS]
    for learner, count, method in sorted(groups, key=lambda k: (k[0], k[1], order.index(k[2]))):
        own = groups[learner, count, method]
        figures = {key: interval([r[key] for r in own]) for key in FIGURES if key in own[0]}
        if "identity" in own[0]:
            alone = {r["seed"]: r["identity"] for r in groups[learner, count, ALONE]}
            lost = [alone[r["seed"]] - r["identity"] for r in own if r["seed"] in alone]
            if lost:
                figures["identity_lost"] = interval(lost)
        table[learner][count][method] = figures | {"seeds": len(own)}
    return table


def plot(table: dict, path: Path) -> None:
    """For each way of learning: identity over the number of concepts, and all methods at four."""
    from matplotlib import pyplot

    figure, rows = pyplot.subplots(
        len(table), 2, figsize=(11, 4.4 * len(table)), layout="constrained", squeeze=False
    )
    for (lines, bars), (learner, by_count) in zip(rows, table.items(), strict=True):
        ends = {}
        for method in CHIEF:
            seen = {n: m[method] for n, m in by_count.items() if method in m}
            points = [(n, *m["identity"]) for n, m in seen.items() if "identity" in m]
            if points:
                n, middle, low, high = zip(*points, strict=True)
                colour = COLOURS[method]
                lines.plot(n, middle, marker="o", markersize=4, color=colour)
                lines.fill_between(n, low, high, color=colour, alpha=0.12, linewidth=0)
                ends[method] = middle[-1]
        for method, height in apart(ends, 0.045).items():
            lines.text(max(COUNTS) + 0.06, height, method, color=COLOURS[method], va="center")
        lines.set(title=f"{learner}: identity by concepts in the file", xticks=COUNTS, ylim=(0, 1))
        lines.set_xlim(min(COUNTS) - 0.1, max(COUNTS) + 0.6)
        lines.grid(alpha=0.3)
        most = by_count.get(max(COUNTS), {})
        found = {name: m["identity"] for name, m in most.items() if "identity" in m}
        for place, (name, (middle, low, high)) in enumerate(sorted(found.items(), key=_middle)):
            bars.barh(place, middle, color=COLOURS.get(name, "#8f8f8f"), height=0.7)
            bars.plot([low, high], [place, place], color="#303030", linewidth=1.2)
            bars.text(0.02, place, f"{name}  {middle:.2f}", va="center", color="white")
        bars.set(title=f"{learner}: identity, {max(COUNTS)} concepts", yticks=[], xlim=(0, 1))
        for axes in (lines, bars):
            axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def apart(heights: dict[str, float], least: float) -> dict[str, float]:
    """The heights, pushed down from the highest one until neighbours are `least` apart."""
    placed: dict[str, float] = {}
    for name, height in sorted(heights.items(), key=lambda entry: -entry[1]):
        placed[name] = min([height, *(above - least for above in placed.values())])
    return placed


def _middle(entry: tuple[str, list[float]]) -> float:
    return entry[1][0]


def finished() -> list[dict]:
    """The fusions in the log."""
    return [json.loads(line) for line in LOG.read_text().splitlines()] if LOG.exists() else []


def all_tasks(options: argparse.Namespace) -> list[Task]:
    """Every method with four concepts, the chief ones with fewer."""
    return [
        Task(learner, seed, count, method)
        for seed in options.seeds
        for learner in options.learners
        for count in COUNTS
        for method in options.methods
        if count == max(COUNTS) or method in CHIEF
    ]


def main() -> None:
    """Measure what is missing, then write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--learners", nargs="+", default=["lora"], help="ways of learning")
    every = [ALONE, ATTACHED, *METHODS]
    parser.add_argument("--methods", nargs="+", default=every, choices=every)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="training seeds")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="then begin no more")
    parser.add_argument("--part", type=int, nargs=2, default=[0, 1], help="share of it: 0 2, 1 2")
    parser.add_argument(
        "--only-train", action="store_true", help="leave the fusions to a later run"
    )
    parser.add_argument("--report", action="store_true", help="only write the figures")
    options = parser.parse_args()
    end = time.monotonic() + 60 * options.minutes
    part = slice(options.part[0], None, options.part[1])
    tasks = all_tasks(options)
    RESULTS.mkdir(exist_ok=True)
    if options.only_train:
        learned = dict.fromkeys((t.learner, c, t.seed) for t in tasks for c in t.concepts())
        for each in list(learned)[part]:
            if time.monotonic() < end:
                print(trained(*each), flush=True)
        return
    done = {tuple(row[key] for key in vars(tasks[0])) for row in finished()}
    missing = [task for task in tasks[part] if tuple(vars(task).values()) not in done]
    for task in [] if options.report else missing:
        if time.monotonic() > end:
            return
        row = measure(task, tuple(range(100, 103)))
        with LOG.open("a") as log:
            log.write(json.dumps(row) + "\n")
        print(row, flush=True)
    table = table_of(finished())
    write_result(
        "fusion", {"precision": PRECISION, "judge": load_judge().accuracy, "figures": table}
    )
    plot(table, RESULTS / "fusion.png")


if __name__ == "__main__":
    main()
