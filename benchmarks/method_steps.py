"""What a training step of each method costs on the pocket base, beside one of plain LoRA.

`python benchmarks/method_steps.py` takes turns: in every round each method does the same number of
steps, and its time is divided by plain LoRA's of that round. All adapt the attention layers alone.
Writes results/method_steps.json.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from concept_methods import METHODS, photos_of
from machine import write_result

from rite_diffusion.methods import METHODS as MAKERS
from rite_diffusion.photos.dataset import encode_photos
from rite_diffusion.training.plan import plan_training
from rite_diffusion.training.settings import configure
from rite_diffusion.training.trainer import Job, Trainer


def open_trainer(method: str, folder: Path) -> Trainer:
    """A trainer of a method on the robot, in a base of its own."""
    photos = photos_of({"concept": "robot", "method": method}, folder)
    wanted = {"photos": str(photos), "trigger": "<robot>", "class_noun": "robot", "method": method}
    plan = plan_training(configure(wanted | {"lora": {"layers": "attention"}}))
    data = encode_photos(plan.backbone, plan.photos, plan.encoding)
    learning = MAKERS[method](plan.backbone, plan.config)
    return Trainer(Job(plan.backbone, learning, data, plan.config))


def seconds(trainer: Trainer, steps: range) -> float:
    """Seconds per step."""
    start = time.perf_counter()
    for step in steps:
        trainer.step(step)
    return (time.perf_counter() - start) / len(steps)


def main() -> None:
    """Measure in turns, print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=5, help="of each method in a round")
    options = parser.parse_args()
    times: dict[str, list[float]] = {method: [] for method in METHODS}
    with tempfile.TemporaryDirectory() as name:
        trainers = {method: open_trainer(method, Path(name)) for method in METHODS}
    for round_ in range(options.rounds + 1):  # the first warms up
        steps = range(round_ * options.steps, (round_ + 1) * options.steps)
        for method, trainer in trainers.items():
            times[method].append(seconds(trainer, steps))
    figures = {}
    for method, found in times.items():
        ratios = [own / plain for own, plain in zip(found[1:], times["lora"][1:], strict=True)]
        figures[method] = {
            "seconds_per_step": round(statistics.median(found[1:]), 4),
            "times_lora": round(statistics.median(ratios), 3),
            "least": round(min(ratios), 3),
            "most": round(max(ratios), 3),
        }
    print(json.dumps(figures, indent=2))
    write_result("method_steps", {"rounds": options.rounds, "methods": figures})


if __name__ == "__main__":
    main()
