"""How well each method learns a concept, with each optimizer, on the pocket base.

`python benchmarks/concept_methods.py` trains every example concept with every method's preset, with
three optimizers and three seeds, and has the judge look at pictures: is the concept there, is the
background right, how far are pictures of other things from the base's own. ED-LoRA gets masks from
the base's attention. Further experiments, with --experiments: `text_rates`, LoRA with the text
encoder's rate over four decades; `keys_and_values`, Custom Diffusion as LoRA, where the optimizers
differ; `parts`, ED-LoRA without one of its parts; `layers`, methods on other layers.
Each finished run is a line of results/concept_methods.jsonl; started again, it does what is
missing. At the end (or with --report alone) it writes results/concept_methods.json and, with the
first seed's pictures of the `methods` experiment, which stay in the cache, concept_methods.png.
"""

import argparse
import json
import math
import multiprocessing
import shutil
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
from concepts import draw, new_prompts, share
from machine import RESULTS, memory_mib, write_result
from optimizer_quality import other_pictures
from PIL import Image
from prompts import CONCEPTS, article

from rite_diffusion.adapters import load_adapter
from rite_diffusion.adapters.attach import attach
from rite_diffusion.api.demo import example_photos
from rite_diffusion.api.masks import make_masks
from rite_diffusion.config import merge, parse_assignments
from rite_diffusion.evaluation.judge import load_judge
from rite_diffusion.files.writing import cache_folder
from rite_diffusion.generation.grid import labelled_grid
from rite_diffusion.training.plan import plan_training
from rite_diffusion.training.run import run_training
from rite_diffusion.training.settings import configure

METHODS = ("lora", "pivotal", "custom_diffusion", "ed_lora")
OPTIMIZERS = ("adamw", "scaled_adamw", "rite")
SEEDS = (0, 1, 2)
PICTURES = [100, 101]  # seeds of each prompt's pictures
SCORES = (
    "identity", "recognised", "background", "drift", "class_kept", "bytes", "seconds", "peak_mib"
)  # fmt: skip
LOG = RESULTS / "concept_methods.jsonl"

# Each experiment: (method, settings as `key=value key=value`) for all optimizers and concepts.
EXPERIMENTS = {
    "methods": [(method, "") for method in METHODS],
    "text_rates": [("lora", f"optim.lr_text_encoder=1e-{power}") for power in (6, 5, 4, 3, 2)],
    "keys_and_values": [("custom_diffusion", "custom_diffusion.weights=lora")],
    "parts": [
        ("ed_lora", "attention.weight=0"),
        ("ed_lora", "tokens.vectors=1"),
        ("ed_lora", "optim.lr_tokens=1e-9"),
    ],
    "layers": [
        ("lora", "lora.layers=attention lora.rank=8 optim.lr=1e-3"),
        ("pivotal", "lora.layers=blocks lora.rank=16 optim.lr=2e-3"),
        ("ed_lora", "lora.layers=blocks lora.rank=16 optim.lr=2e-3"),
    ],
}


def runs(
    experiments: list[str], optimizers: list[str], concepts: list[str], seeds: list[int]
) -> list[dict]:
    """Every run, seed by seed, so that a stopped benchmark is balanced.

    Every optimizer leaves whole matrices to AdamW at its own rate for pairs; one seed shows that.
    """
    return [
        {"method": method, "settings": line, "optimizer": optimizer, "concept": name, "seed": seed}
        for seed in seeds
        for name in concepts
        for experiment in experiments
        for method, line in EXPERIMENTS[experiment]
        for optimizer in optimizers
        if optimizer == "adamw" or seed == SEEDS[0] or (method, line) != ("custom_diffusion", "")
    ]


def photos_of(task: dict, folder: Path) -> Path:
    """The concept's photos, for ED-LoRA with masks."""
    photos = example_photos(task["concept"])
    if task["method"] != "ed_lora":
        return photos
    shutil.copytree(photos, folder / task["concept"])
    make_masks(folder / task["concept"], CONCEPTS[task["concept"]][0])
    return folder / task["concept"]


def run(task: dict) -> dict:
    """One training; returns the task with its scores."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        try:
            return task | {"fault": None} | scores(task, Path(name))
        except Exception as error:  # noqa: BLE001 - a setting that breaks the run is a result
            return task | {"fault": f"{type(error).__name__}: {error}"}


def scores(task: dict, folder: Path) -> dict:
    """Train in a folder and have the result judged."""
    noun, grounds = CONCEPTS[task["concept"]]
    trigger = f"<{task['concept']}>"
    wanted = {"photos": str(photos_of(task, folder)), "trigger": trigger, "class_noun": noun}
    wanted |= {"method": task["method"], "seed": task["seed"], "previews": {"every": 0}}
    wanted = merge(wanted, {"optim": {"name": task["optimizer"]}})
    plan = plan_training(configure(merge(wanted, parse_assignments(task["settings"].split()))))
    before = other_pictures(plan)
    start = time.perf_counter()
    path = run_training(plan, folder / "run")
    seconds = time.perf_counter() - start
    attach(plan.backbone, load_adapter(path), "concept")
    drift = (other_pictures(plan) - before).square().mean().sqrt().item()
    prompts, asked = zip(*new_prompts(trigger, grounds), strict=True)
    pictures = draw(plan.backbone, list(prompts), PICTURES)
    if task["seed"] == SEEDS[0] and not task["settings"]:
        pictures[0].save(picture_path(task["method"], task["optimizer"], task["concept"]))
    classes = draw(plan.backbone, [f"{article(noun)} on a blue background"], PICTURES)
    judge, photos = load_judge(), [photo.image for photo in plan.folder.photos]
    right = [a == b for a, b in zip(judge.colours(pictures), _each(asked), strict=True)]
    return {
        "identity": round(judge.identity(photos, pictures), 4),
        "recognised": share(judge.recognised(photos, pictures)),
        "background": share(right),
        "drift": round(drift, 4),
        "class_kept": share([found == noun for found in judge.nouns(classes)]),
        "bytes": path.stat().st_size,
        "seconds": round(seconds, 1),
        "peak_mib": round(memory_mib("self", "VmHWM")),
    }


def picture_path(method: str, optimizer: str, concept: str) -> Path:
    """Where a run's first picture is kept."""
    folder = cache_folder() / "concept_methods"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{method}-{optimizer}-{concept}.png"


def sheet() -> Image.Image | None:
    """A photo of each concept, and its picture by every method and optimizer; None if some lack."""
    each = [(method, optimizer) for method in METHODS for optimizer in OPTIMIZERS]
    files = [[picture_path(*row, concept) for concept in CONCEPTS] for row in each]
    if not all(file.exists() for row in files for file in row):
        return None
    photos = [Image.open(sorted(example_photos(concept).glob("*.jpg"))[0]) for concept in CONCEPTS]
    rows = [photos, *([Image.open(file) for file in row] for row in files)]
    labels = ["a photo", *(f"{method} {optimizer}" for method, optimizer in each)]
    return labelled_grid(rows, labels, [f"<{concept}>" for concept in CONCEPTS], 128, 180)


def _each(asked: tuple[str, ...]) -> list[str]:
    return [ground for ground in asked for _ in PICTURES]


def key(row: dict) -> tuple:
    """What makes a run that run."""
    return tuple(row[name] for name in ("method", "settings", "optimizer", "concept", "seed"))


def finished() -> list[dict]:
    """The runs in the log."""
    return [json.loads(line) for line in LOG.read_text().splitlines()] if LOG.exists() else []


def report(rows: list[dict]) -> dict:
    """Mean of each score over concepts and seeds, and the identity's standard error."""
    groups = defaultdict(list)
    for row in rows:
        groups[f"{row['method']} {row['settings']}".strip(), row["optimizer"]].append(row)
    figures: dict[str, dict] = defaultdict(dict)
    for (what, optimizer), found in sorted(groups.items()):
        whole = [row for row in found if not row["fault"]]
        means = {
            name: round(statistics.mean(row[name] for row in whole), 4)
            for name in (SCORES if whole else ())
        }
        identities = [row["identity"] for row in whole]
        error = None  # of the mean; a single run tells none
        if len(whole) > 1:
            error = round(statistics.stdev(identities) / math.sqrt(len(whole)), 4)
        counts = {"runs": len(found), "broken": len(found) - len(whole)}
        figures[what][optimizer] = counts | means | {"identity_error": error}
    return figures


def main() -> None:
    """Do the runs that are missing, then write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experiments", nargs="+", default=["methods"], choices=EXPERIMENTS)
    parser.add_argument("--optimizers", nargs="+", default=OPTIMIZERS, choices=OPTIMIZERS)
    parser.add_argument("--concepts", nargs="+", default=list(CONCEPTS), choices=CONCEPTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after this long")
    parser.add_argument("--report", action="store_true", help="only write the figures")
    options = parser.parse_args()
    done = {key(row) for row in finished()}
    wanted = runs(options.experiments, options.optimizers, options.concepts, options.seeds)
    tasks = [task for task in wanted if key(task) not in done]
    start = time.time()
    if tasks and not options.report:
        RESULTS.mkdir(exist_ok=True)
        # A process of its own for each run, so that its peak of memory is its own; what they import
        # is imported once.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(
            ["rite_diffusion.training.run", "rite_diffusion.evaluation.judge"]
        )
        with context.Pool(options.processes, maxtasksperchild=1) as pool, LOG.open("a") as log:
            for count, row in enumerate(pool.imap_unordered(run, tasks), 1):
                log.write(json.dumps(row) + "\n")
                log.flush()
                minutes = (time.time() - start) / 60
                print(f"{count}/{len(tasks)} {minutes:.0f} min", row, flush=True)
                if minutes > options.minutes:
                    pool.terminate()
                    break
    print(write_result("concept_methods", {"figures": report(finished())}))
    if pictures := sheet():
        pictures.save(RESULTS / "concept_methods.png")


if __name__ == "__main__":
    main()
