"""Which starts, kinds of adapter and rate-free optimizers pay in 150 steps on the pocket base.

`python benchmarks/adapter_variants.py [GROUP ...]` trains every example concept with every variant
of the groups, on attention alone, batch 2, at a constant rate, seed 0. The judge scores pictures at
fixed steps as in optimizer_quality.py. Each finished run is a line of
results/adapter_variants.jsonl; started again, it does what is missing. At the end (or with --report
alone) it writes results/adapter_variants.json. The usual start, "gaussian", is what the other
groups are to be compared with.
"""

import argparse
import json
import math
import statistics
import time
from collections import defaultdict
from functools import cache

import torch
from machine import RESULTS, write_result
from optimizer_quality import CONCEPTS, drawn, other_pictures, plan_of, prompts_of

from rite_diffusion.evaluation.judge import load_judge
from rite_diffusion.methods import METHODS
from rite_diffusion.photos.dataset import encode_photos
from rite_diffusion.training.job import Job
from rite_diffusion.training.settings import configure
from rite_diffusion.training.trainer import train_steps

CHECKS = (12, 50, 150)  # steps at which the pictures are judged
LOG = RESULTS / "adapter_variants.jsonl"


def start(init: str, name: str, lr: float, **lora) -> dict:
    """Settings of a start under an optimizer."""
    return {"lora": {"init": init, **lora}, "optim": {"name": name, "lr": lr}}


def kind(name: str, optimizer: str, lr: float, **lora) -> dict:
    """Settings of a kind of adapter under an optimizer."""
    return {"lora": {"kind": name, **lora}, "optim": {"name": optimizer, "lr": lr}}


def with_options(variant: dict, **options) -> dict:
    """Settings with the optimizer's own options."""
    return variant | {"optim": variant["optim"] | {"options": options}}


GROUPS: dict[str, dict[str, dict]] = {
    "starts": {
        "gaussian, adamw 1e-3": start("gaussian", "adamw", 1e-3),
        "pissa, adamw 1e-3": start("pissa", "adamw", 1e-3),
        "lora_one 0.1, adamw 1e-3": start("lora_one", "adamw", 1e-3, init_size=0.1),
        "lora_one 0.5, adamw 1e-3": start("lora_one", "adamw", 1e-3, init_size=0.5),
        "gaussian, rite 1e-3": start("gaussian", "rite", 1e-3),
        "pissa, rite 1e-3": start("pissa", "rite", 1e-3),
        "lora_one 0.1, rite 1e-3": start("lora_one", "rite", 1e-3, init_size=0.1),
    },
    "kinds": {
        "dora 8, adamw 1e-3": kind("dora", "adamw", 1e-3),
        "loha 4, adamw 1e-3": kind("loha", "adamw", 1e-3, rank=4),
        "lokr whole 4, adamw 1e-3": kind("lokr", "adamw", 1e-3, factor=4, full_matrix=True),
        "loha 4, rite 1e-3": kind("loha", "rite", 1e-3, rank=4),
    },
    "rate-free": {
        "prodigy": kind("lora", "prodigy", 1.0),
        "prodigy, d0 1e-4": with_options(kind("lora", "prodigy", 1.0), d0=1e-4),
        "prodigy, d_coef 2": with_options(kind("lora", "prodigy", 1.0), d_coef=2.0),
        "adamw_schedule_free 1e-3": kind("lora", "adamw_schedule_free", 1e-3),
        "adamw_schedule_free 2.5e-3": kind("lora", "adamw_schedule_free", 2.5e-3),
        "prodigy, lokr whole 4": kind("lokr", "prodigy", 1.0, factor=4, full_matrix=True),
    },
}


@cache
def photos_of(concept: str):
    """The plan of a concept and its encoded photos."""
    plan = plan_of(concept)
    return plan, encode_photos(plan.backbone, plan.photos, plan.encoding)


def settings_of(concept: str, variant: dict) -> dict:
    """The settings of a run, which learns nothing but the concept's photos."""
    plan = plan_of(concept)
    settings = {
        "photos": plan.config.photos,
        "trigger": f"<{concept}>",
        "class_noun": CONCEPTS[concept][0],
        "prior": {"weight": 0},
        "steps": max(CHECKS),
        "batch": 2,
        "seed": 0,
    }
    lora = {"layers": "attention", "rank": 8} | variant.get("lora", {})
    optim = {"schedule": "constant", "warmup": 0} | variant["optim"]
    return settings | {"lora": lora, "optim": optim}


def run(group: str, name: str, concept: str) -> dict:
    """One training's scores by step."""
    plan, data = photos_of(concept)
    judge, photos = load_judge(), [photo.image for photo in plan.folder.photos]
    config = configure(settings_of(concept, GROUPS[group][name]))
    before = other_pictures(plan)
    identity, recognised = {}, {}
    method = METHODS["lora"](plan.backbone, config)

    def after(report) -> None:
        if report.step in CHECKS:
            images = drawn(plan, prompts_of(concept))
            identity[str(report.step)] = round(judge.identity(photos, images), 4)
            recognised[str(report.step)] = sum(judge.recognised(photos, images)) / len(images)

    begun = time.process_time()
    try:
        train_steps(Job(plan.backbone, method, data, config), after)
        drift = (other_pictures(plan) - before).square().mean().sqrt().item()
        fault = None
    except Exception as error:  # noqa: BLE001 - settings that break the run are a result
        drift, fault = math.nan, f"{type(error).__name__}: {error}"
    finally:
        method.remove()
    return {
        "group": group,
        "variant": name,
        "concept": concept,
        "identity": identity,
        "recognised": recognised,
        "drift": round(drift, 4),
        "fault": fault,
        "cpu_seconds": round(time.process_time() - begun, 1),
    }


def finished() -> list[dict]:
    """The runs in the log."""
    return [json.loads(line) for line in LOG.read_text().splitlines()] if LOG.exists() else []


def report(rows: list[dict]) -> dict:
    """Group -> variant -> means over concepts, with the standard error of the last identity."""
    by_variant = defaultdict(list)
    for row in rows:
        by_variant[row["group"], row["variant"]].append(row)
    table: dict[str, dict] = {}
    for (group, name), own in by_variant.items():
        at = {str(step): [row["identity"].get(str(step), 0.0) for row in own] for step in CHECKS}
        last = at[str(max(CHECKS))]
        shares = [row["recognised"].get(str(max(CHECKS)), 0.0) for row in own]
        table.setdefault(group, {})[name] = {
            "identity": {step: round(statistics.mean(values), 3) for step, values in at.items()},
            "recognised": round(statistics.mean(shares), 3),
            "drift": round(statistics.mean(row["drift"] for row in own), 3),
            "cpu_seconds": round(statistics.median(row["cpu_seconds"] for row in own), 1),
            "error": round(statistics.stdev(last) / len(last) ** 0.5, 3) if len(last) > 1 else None,
            "runs": len(own),
        }
    return table


def main() -> None:
    """Do the runs that are missing, then write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("groups", nargs="*", default=list(GROUPS), help=", ".join(GROUPS))
    parser.add_argument("--concepts", nargs="+", default=list(CONCEPTS), choices=CONCEPTS)
    parser.add_argument("--report", action="store_true", help="only write the figures")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.report:
        done = {(row["group"], row["variant"], row["concept"]) for row in finished()}
        chosen = [(group, variant) for group in options.groups for variant in GROUPS[group]]
        tasks = [(*each, concept) for concept in options.concepts for each in chosen]
        for task in [task for task in tasks if task not in done]:
            row = run(*task)
            with LOG.open("a") as log:
                log.write(json.dumps(row) + "\n")
            print(
                *task, row["identity"], row["drift"], row["cpu_seconds"], row["fault"], flush=True
            )
    figures = report(finished())
    print(json.dumps(figures, indent=1))
    write_result("adapter_variants", {"checks": CHECKS, "seed": 0, "figures": figures})


if __name__ == "__main__":
    main()
