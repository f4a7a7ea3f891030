"""How well and how fast each optimizer learns a concept, over learning rates and seeds.

`python benchmarks/optimizer_quality.py` trains every example concept on the pocket base with every
optimizer, at rates over four decades: a rate per decade, then the two half decades beside each
optimizer's best. In a round every concept is learned with one seed; three rounds are all concepts
with all seeds. Then whole trainings of fixed lengths, with a rate that decays, at the best rate and
half a decade above. The judge scores pictures at fixed steps: identity with the photos,
and how far pictures of other things drift. Each finished run is a line of
results/optimizer_quality.jsonl; started again, it does what is missing. At the end (or with
--report alone) it writes results/optimizer_quality.json and .png.
"""

import argparse
import json
import math
import multiprocessing
import statistics
import time
from collections import defaultdict
from functools import cache
from pathlib import Path

import torch
from machine import RESULTS, write_result
from PIL.Image import Image
from prompts import CONCEPTS, article

from rite_diffusion.api.demo import example_photos
from rite_diffusion.evaluation.judge import load_judge
from rite_diffusion.generation.denoise import sample
from rite_diffusion.methods import METHODS
from rite_diffusion.photos.dataset import encode_photos
from rite_diffusion.photos.images import to_tensor
from rite_diffusion.training.job import Job
from rite_diffusion.training.plan import Plan, plan_training
from rite_diffusion.training.settings import configure
from rite_diffusion.training.trainer import train_steps

# The lowest rate of each, as a power of ten; the sweep covers four decades from there.
LOWEST = {"sgd": -3, "adamw": -5, "scaled_sgd": -4, "scaled_adamw": -5, "rite": -4}
DECADES = 4
CHECKS = (12, 25, 50, 100)  # steps at which the pictures are judged
BATCH = 2
DECAYED = ("adamw", "scaled_adamw", "rite")  # trained at fixed lengths, the rate falling to zero
SAMPLING_STEPS = 8
SEEDS = (0, 1, 2)
OTHERS = ("dog", "apple", "house", "fish")  # drawn without the trigger, to see the drift
LOG = RESULTS / "optimizer_quality.jsonl"


def rates(optimizer: str) -> list[float]:
    """A rate per decade."""
    return [rounded(LOWEST[optimizer] + step) for step in range(DECADES + 1)]


def rounded(power: float) -> float:
    """Ten to a power, to three digits."""
    return float(f"{10**power:.3g}")


def runs(concepts: list[str], rounds: int, grid: dict[str, list[float]]) -> list[dict]:
    """Every run at the rates of `grid`: in each round all concepts, in all rounds all seeds."""
    return [
        {"concept": concept, "optimizer": optimizer, "rate": rate, "seed": SEEDS[seed]}
        for turn in range(rounds)
        for index, concept in enumerate(concepts)
        for seed in [(index + turn) % len(SEEDS)]
        for optimizer, chosen in grid.items()
        for rate in chosen
    ]


def decayed_runs(tasks: list[dict]) -> list[dict]:
    """The runs' twins at every length in CHECKS, their rate on a cosine."""
    return [task | {"length": length} for length in CHECKS for task in tasks]


def best_rate(rows: list[dict], optimizer: str) -> float:
    """The rate with the highest identity at the last step."""
    curve = by_rate(rows, optimizer, max(CHECKS))
    return max(curve, key=lambda rate: curve[rate])


def beside_best(rows: list[dict]) -> dict[str, list[float]]:
    """The half decades below and above each optimizer's best rate."""
    grid = {}
    for optimizer in LOWEST:
        power = round(math.log10(best_rate(rows, optimizer)))
        grid[optimizer] = [rounded(power - 0.5), rounded(power + 0.5)]
    return grid


def and_above(rate: float) -> list[float]:
    """A rate of the sweep and the one half a decade above."""
    halves = round(2 * math.log10(rate))
    return [rounded(halves / 2), rounded((halves + 1) / 2)]


@cache
def plan_of(concept: str) -> Plan:
    """The concept's photos and the base."""
    wanted = {"photos": str(example_photos(concept)), "trigger": f"<{concept}>"}
    # Nothing but the optimizer holds the base's own pictures; attention alone is adapted.
    wanted |= {"prior": {"weight": 0}, "lora": {"layers": "attention", "rank": 8}}
    return plan_training(configure(wanted | {"class_noun": CONCEPTS[concept][0]}))


def prompts_of(concept: str) -> list[str]:
    """Four backgrounds that the photos lack."""
    return [f"a <{concept}> on {article(c)} background" for c in CONCEPTS[concept][1]]


def drawn(plan: Plan, prompts: list[str]) -> list[Image]:
    """A picture per prompt at fixed seeds."""
    seeds = list(range(50, 50 + len(prompts)))
    return sample(plan.backbone, prompts, seeds, steps=SAMPLING_STEPS)


def other_pictures(plan: Plan) -> torch.Tensor:
    """Pictures of other things at fixed seeds, (n, 3, 64, 64)."""
    images = drawn(plan, [f"{article(noun)} on a blue background" for noun in OTHERS])
    return torch.stack([to_tensor(image) for image in images])


def run(task: dict) -> dict:
    """One training; returns the task with its scores by step."""
    torch.set_num_threads(1)
    plan, judge = plan_of(task["concept"]), load_judge()
    photos = [photo.image for photo in plan.folder.photos]
    length = task.get("length")
    checks = (length,) if length else CHECKS
    schedule = "cosine" if length else "constant"
    optim = {"name": task["optimizer"], "lr": task["rate"], "schedule": schedule, "warmup": 0}
    settings = plan.config.model_dump(exclude={"optim"}, exclude_none=True)
    settings |= {"optim": optim, "seed": task["seed"], "steps": max(checks), "batch": BATCH}
    config = configure(settings)
    before = other_pictures(plan)
    data = encode_photos(plan.backbone, plan.photos, plan.encoding)
    method = METHODS["lora"](plan.backbone, config)
    prompts, identity, recognised = prompts_of(task["concept"]), {}, {}

    def after(report) -> None:
        if report.step in checks:
            images = drawn(plan, prompts)
            identity[report.step] = round(judge.identity(photos, images), 4)
            recognised[report.step] = sum(judge.recognised(photos, images)) / len(images)

    start = time.perf_counter()
    try:
        train_steps(Job(plan.backbone, method, data, config), after)
        drift = (other_pictures(plan) - before).square().mean().sqrt().item()
        fault = None
    except Exception as error:  # noqa: BLE001 - a rate that breaks the run is a result
        drift, fault = math.nan, f"{type(error).__name__}: {error}"
    finally:
        method.remove()
    scores = {"identity": identity, "recognised": recognised, "drift": round(drift, 4)}
    return task | scores | {"fault": fault, "seconds": round(time.perf_counter() - start, 1)}


def key(task: dict) -> tuple:
    """What makes a run that run."""
    return *(task[name] for name in ("concept", "optimizer", "rate", "seed")), task.get("length")


def finished() -> list[dict]:
    """The runs in the log."""
    return [json.loads(line) for line in LOG.read_text().splitlines()] if LOG.exists() else []


def score(row: dict, step: int) -> float:
    """Identity at a step; zero for a run that broke."""
    return row["identity"].get(str(step), 0.0)


def swept(rows: list[dict]) -> list[dict]:
    """The rows of the sweep at constant rates."""
    return [row for row in rows if "length" not in row]


def by_rate(rows: list[dict], optimizer: str, step: int) -> dict[float, float]:
    """Rate -> mean identity over concepts and seeds at a step."""
    found = defaultdict(list)
    for row in rows:
        if row["optimizer"] == optimizer:
            found[row["rate"]].append(score(row, step))
    return {rate: statistics.mean(found[rate]) for rate in sorted(found)}


def usable_range(curve: dict[float, float], base: float, share: float = 0.95) -> float:
    """Largest over smallest rate whose gain over the untrained base is ≥ 95 % of the best.

    Between the rates that were tried, identity is taken to be linear in the rate's logarithm.
    """
    powers = [math.log10(rate) for rate in curve]
    values = list(curve.values())
    bar = base + share * (max(values) - base)
    top = values.index(max(values))

    def crossing(indices: range) -> float:
        """Where the curve falls below the bar, going away from the best rate."""
        last = top
        for i in indices:
            if values[i] < bar:
                part = (values[last] - bar) / (values[last] - values[i])
                return powers[last] + part * (powers[i] - powers[last])
            last = i
        return powers[last]

    low, high = crossing(range(top - 1, -1, -1)), crossing(range(top + 1, len(values)))
    return 10 ** (high - low)


def decayed(rows: list[dict]) -> dict[str, dict]:
    """Optimizer -> rate -> length -> mean identity of trainings of that length."""
    table: dict[str, dict] = {}
    for optimizer in DECAYED:
        for length in CHECKS:
            here = [row for row in rows if row.get("length") == length]
            for rate, value in by_rate(here, optimizer, length).items():
                table.setdefault(optimizer, {}).setdefault(f"{rate:g}", {})[length] = round(
                    value, 4
                )
    return table


def report(rows: list[dict]) -> dict:
    """The sweep's figures."""
    last = max(CHECKS)
    base = statistics.mean(
        base_identity(concept) for concept in sorted({r["concept"] for r in rows})
    )
    figures: dict[str, dict] = {"untrained identity": {"value": base}}
    goal = max(by_rate(rows, "adamw", last).values())
    for optimizer in LOWEST:
        curve = by_rate(rows, optimizer, last)
        if not curve:
            continue
        best = max(curve, key=lambda rate: curve[rate])
        own = [r for r in rows if r["optimizer"] == optimizer and r["rate"] == best]
        reached = [step for step in CHECKS if by_rate(own, optimizer, step)[best] >= goal]
        figures[optimizer] = {
            "best_rate": best,
            "identity": round(curve[best], 4),
            "identity_by_step": {s: round(by_rate(own, optimizer, s)[best], 4) for s in CHECKS},
            "recognised": round(statistics.mean(r["recognised"].get(str(last), 0) for r in own), 3),
            "drift": round(statistics.mean(r["drift"] for r in own), 4),
            "usable_range": round(usable_range(curve, base), 1),
            "steps_to_adamw_best": reached[0] if reached else None,
            "curve": {f"{rate:g}": round(value, 4) for rate, value in curve.items()},
            "runs": len([r for r in rows if r["optimizer"] == optimizer]),
        }
    return figures


@cache
def base_identity(concept: str) -> float:
    """Identity of the untrained base's pictures with the photos."""
    plan = plan_of(concept)
    images = drawn(plan, prompts_of(concept))
    return load_judge().identity([photo.image for photo in plan.folder.photos], images)


def plot(rows: list[dict], path: Path) -> None:
    """Identity against the rate, and against the step at each one's best rate."""
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for optimizer in LOWEST:
        curve = by_rate(rows, optimizer, max(CHECKS))
        if not curve:
            continue
        left.plot(list(curve), list(curve.values()), marker="o", markersize=3, label=optimizer)
        best = max(curve, key=lambda rate: curve[rate])
        own = [row for row in rows if row["rate"] == best]
        right.plot(
            CHECKS, [by_rate(own, optimizer, s)[best] for s in CHECKS], marker="o", markersize=3,
            label=f"{optimizer}, rate {best:g}",
        )  # fmt: skip
    left.set(xscale="log", xlabel="learning rate", ylabel=f"identity after {max(CHECKS)} steps")
    right.set(xlabel="steps", ylabel="identity at the best rate", xlim=(0, None))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def work(tasks: list[dict], processes: int, deadline: float) -> bool:
    """Do the runs that are missing in the log; False where time was up before the last."""
    done = {key(row) for row in finished()}
    missing = [task for task in tasks if key(task) not in done]
    if not missing:
        return True
    RESULTS.mkdir(exist_ok=True)
    context = multiprocessing.get_context("spawn")
    with context.Pool(processes) as pool, LOG.open("a") as log:
        for count, row in enumerate(pool.imap_unordered(run, missing), 1):
            log.write(json.dumps(row) + "\n")
            log.flush()
            print(f"{count}/{len(missing)}", *key(row), row["identity"], flush=True)
            if time.time() > deadline:
                pool.terminate()
                return False
    return True


def rough_rows(tasks: list[dict]) -> list[dict]:
    """The finished rows of some runs."""
    wanted = {key(task) for task in tasks}
    return [row for row in finished() if key(row) in wanted]


def main() -> None:
    """Do the runs that are missing, then write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--concepts", nargs="+", default=list(CONCEPTS), choices=CONCEPTS)
    parser.add_argument("--rounds", type=int, default=len(SEEDS), choices=range(1, len(SEEDS) + 1))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after this long")
    parser.add_argument("--report", action="store_true", help="only write the figures")
    options = parser.parse_args()
    deadline = time.time() + 60 * options.minutes
    if not options.report:
        grid = {optimizer: rates(optimizer) for optimizer in LOWEST}
        rough = runs(options.concepts, options.rounds, grid)
        if work(rough, options.processes, deadline):
            fine = runs(options.concepts, options.rounds, beside_best(rough_rows(rough)))
            if work(fine, options.processes, deadline):
                rows = swept(finished())
                best = {each: and_above(best_rate(rows, each)) for each in DECAYED}
                whole = runs(options.concepts, 1, best)
                work(decayed_runs(whole), options.processes, deadline)
    rows = finished()
    torch.set_num_threads(2)
    settings = {"batch": BATCH, "checks": CHECKS, "rounds": options.rounds}
    figures = {"figures": report(swept(rows)), "decayed": decayed(rows)}
    write_result("optimizer_quality", {"settings": settings} | figures)
    plot(swept(rows), RESULTS / "optimizer_quality.png")


if __name__ == "__main__":
    main()
