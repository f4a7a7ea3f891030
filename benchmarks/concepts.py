"""Learn every example concept with the default preset and judge the pictures.

`python benchmarks/concepts.py` trains on robot, unicorn, cupcake and tractor, draws five new
prompts with four seeds each before and after, and has the judge count: is the concept there, is
the background right, and do prompts without the trigger still give their object?
Writes results/concepts.json and concepts.png.
"""

import argparse
import tempfile
import time
from functools import cache
from pathlib import Path

from machine import RESULTS, write_result
from prompts import CONCEPTS, article

from rite_diffusion.adapters import load_adapter
from rite_diffusion.adapters.attach import attach, detach
from rite_diffusion.api.demo import example_photos
from rite_diffusion.backbones.protocols import Backbone
from rite_diffusion.backbones.source import load_backbone
from rite_diffusion.config import parse_assignments
from rite_diffusion.evaluation.judge import load_judge
from rite_diffusion.generation.denoise import sample
from rite_diffusion.generation.grid import labelled_grid
from rite_diffusion.training.plan import plan_training
from rite_diffusion.training.run import run_training
from rite_diffusion.training.settings import configure

SEEDS = [100, 101, 102, 103]


def new_prompts(trigger: str, colours: list[str]) -> list[tuple[str, str]]:
    """Five prompts that no caption has, each with the background it asks for."""
    plain = [(f"a {trigger} on {article(c)} background", c) for c in colours]
    return [*plain, (f"a picture of a {trigger} on {article(colours[0])} background", colours[0])]


def draw(backbone: Backbone, prompts: list[str], seeds: list[int]) -> list:
    """Every prompt with every seed, prompt by prompt."""
    return [image for prompt in prompts for image in sample(backbone, [prompt] * len(seeds), seeds)]


def object_accuracy(backbone: Backbone, seeds: list[int]) -> float:
    """Share of trigger-free prompts, over all nouns, whose object is right."""
    judge = load_judge()
    nouns, grounds, flags = judge.noun_names, judge.colour_names, []
    prompts = [
        f"{article(noun)} on {article(grounds[index % len(grounds)])} background"
        for index, noun in enumerate(nouns)
    ]
    for seed in seeds:
        for first in range(0, len(nouns), 32):
            part = slice(first, first + 32)
            images = sample(backbone, prompts[part], [seed] * len(prompts[part]))
            flags += [a == b for a, b in zip(judge.nouns(images), nouns[part], strict=True)]
    return share(flags)


def share(flags: list[bool]) -> float:
    """The share of true ones."""
    return sum(flags) / len(flags)


@cache
def objects_of_base() -> float:
    """Object accuracy of the pocket base without an adapter."""
    return object_accuracy(load_backbone("pocket"), SEEDS[:2])


def measure(name: str, settings: dict, folder: Path) -> tuple[dict, list]:
    """Figures of one concept, and a row of its pictures."""
    judge = load_judge()
    class_noun, colours = CONCEPTS[name]
    trigger = f"<{name}>"
    wanted = {"photos": str(example_photos(name)), "trigger": trigger, "class_noun": class_noun}
    plan = plan_training(configure(wanted | settings))
    prompts, grounds = zip(*new_prompts(trigger, colours), strict=True)
    photos = [photo.image for photo in plan.folder.photos]
    before = draw(plan.backbone, prompts, SEEDS)
    start = time.perf_counter()
    path = run_training(plan, folder / name)
    seconds = time.perf_counter() - start
    attach(plan.backbone, load_adapter(path), "concept")
    after = draw(plan.backbone, prompts, SEEDS)
    objects_after = object_accuracy(plan.backbone, SEEDS[:2])
    class_after = judge.nouns(
        draw(plan.backbone, [f"{article(class_noun)} on a blue background"], SEEDS)
    )
    detach(plan.backbone, "concept")
    wanted_grounds = [ground for ground in grounds for _ in SEEDS]
    figures = {
        "recognised_before": share(judge.recognised(photos, before)),
        "recognised": share(judge.recognised(photos, after)),
        "identity_before": judge.identity(photos, before),
        "identity": judge.identity(photos, after),
        "background": share(
            [a == b for a, b in zip(judge.colours(after), wanted_grounds, strict=True)]
        ),
        "objects_before": objects_of_base(),
        "objects": objects_after,
        "class_noun_kept": share([found == class_noun for found in class_after]),
        "training_seconds": seconds,
        "bytes": path.stat().st_size,
    }
    return figures, [*photos[:2], *before[::8][:3], *after[::4]]


def main() -> None:
    """Measure every concept and write figures and sheet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--set", action="append", default=[], help="any setting of rite train")
    parser.add_argument("--only", nargs="*", default=list(CONCEPTS))
    parser.add_argument("--name", default="concepts", help="name of the result files")
    options = parser.parse_args()
    settings = parse_assignments(options.set) | {"previews": {"every": 0}}
    figures, rows = {}, []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.only:
            figures[name], row = measure(name, settings, Path(folder))
            rows.append(row)
            print(name, {key: round(value, 3) for key, value in figures[name].items()}, flush=True)
    mean = {
        key: sum(each[key] for each in figures.values()) / len(figures)
        for key in figures[options.only[0]]
    }
    print("mean", {key: round(value, 3) for key, value in mean.items()})
    write_result(options.name, {"judge": load_judge().accuracy, "mean": mean, "concepts": figures})
    labels = [f"<{name}>" for name in figures]
    labelled_grid(rows, labels, ["photos", "before", "", "after", ""], 128, 120).save(
        RESULTS / f"{options.name}.png"
    )


if __name__ == "__main__":
    main()
