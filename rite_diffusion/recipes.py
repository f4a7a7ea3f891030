"""The whole flow on one screen: a photo folder becomes an adapter, a prompt becomes pictures."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL.Image import Image

from rite_diffusion.adapters import Adapter, AdapterInfo, attach, load_adapter
from rite_diffusion.adapters.attach import check_base
from rite_diffusion.adapters.choice import Chosen, choose_adapters, renamings
from rite_diffusion.backbones import StableDiffusion, load_backbone
from rite_diffusion.generation.attached import as_attached, attached_name
from rite_diffusion.generation.composition import SUM
from rite_diffusion.generation.control import load_controls, parse_control
from rite_diffusion.generation.metadata import save_png
from rite_diffusion.generation.output import next_file, output_target
from rite_diffusion.generation.picture import complete, picture, placed
from rite_diffusion.generation.regions import adapter_weights, parse_regions
from rite_diffusion.plan import configure, plan_training
from rite_diffusion.run import default_run, run_training
from rite_diffusion.training.loop import StepReport
from rite_diffusion.types import AdapterError


def train(
    photos: str | Path,
    *,
    trigger: str,
    class_noun: str,
    base: str = "pocket",
    preset: str | None = None,
    out: str | Path | None = None,
    listen: Callable[[StepReport], None] = lambda report: None,
    override: bool = False,
    **settings: Any,
) -> Path:
    """Train a concept adapter from a photo folder and return its file's path.

    `settings` are those of `TrainConfig`: `steps=200, optim={"lr": 1e-3}`. The run folder `out`
    defaults to `runs/<name of the photo folder>`; a stopped run there goes on.
    """
    wanted = {"photos": str(photos), "trigger": trigger, "class_noun": class_noun, "base": base}
    plan = plan_training(configure(wanted | settings, preset))
    return run_training(plan, Path(out) if out else default_run(plan), listen, override)


def open_base(base: str | StableDiffusion | None, infos: Sequence[AdapterInfo]) -> StableDiffusion:
    """The base model; it defaults to the one that the adapters were made for, else to `pocket`.

    A model that is open already comes back as it is.
    """
    if isinstance(base, StableDiffusion):
        return base
    recorded = [info.base for info in infos if info.base]
    base = base or (recorded[0] if recorded else "pocket")
    if base in recorded and base != "pocket" and "/" not in base and not Path(base).exists():
        raise AdapterError(f"the adapter was made for '{base}': pass its path as --base.")
    return load_backbone(base)


def open_with_adapters(
    base: str | None, adapters: list[Chosen], other_base: bool = False
) -> StableDiffusion:
    """The base model with the adapters attached; it defaults to the base they were made for.

    AdapterError where they were trained on another base, unless `other_base` accepts it.
    """
    backbone = open_base(base, [each.adapter.info for each in adapters])
    for index, chosen in enumerate(adapters):
        if not other_base:
            check_base(backbone, chosen.adapter)
        attach(backbone, chosen.adapter, attached_name(index), chosen.weight)
    return backbone


def generate(
    prompt: str,
    *,
    adapters: Sequence[str | Path] = (),
    regions: Sequence[str] = (),
    combine: str = SUM,
    controls: Sequence[str] = (),
    base: str | None = None,
    seed: int = 0,
    num: int = 1,
    steps: int = 25,
    guidance: float | None = None,
    negative: str = "",
    width: int | None = None,
    height: int | None = None,
    out: str | Path | None = None,
    other_base: bool = False,
    listen: Callable[[int], None] = lambda done: None,
) -> list[Image]:
    """Pictures of a prompt, for the seeds `seed`, `seed + 1`, …; adapters are `FILE[:WEIGHT]`.

    `regions` are `x0,y0,x1,y1: prompt [:: negative [:: weights]]`, parts of the picture with
    prompts of their own, or `at WORD: prompt ...`, whose box is where the prompt's own picture has
    that word; `combine` is how several adapters act together: `sum`, `switch` or `composite`;
    `controls` are `MODEL=PICTURE[:WEIGHT]`, ControlNets and T2I-Adapters. Pictures are made one at
    a time, so each depends on its own parameters alone. With `out`, a folder or for one picture a
    `.png`, they are written as PNGs that carry their parameters; `image.info["path"]` tells where.
    Adapters of another base are refused, unless `other_base`; where two have learned the same
    word, the second's gets a new name, which stderr tells.
    """
    chosen = choose_adapters(adapters)
    for line in renamings(chosen):
        print(line, file=sys.stderr)
    attached = as_attached(chosen)
    parts = parse_regions(regions, prompt)
    adapter_weights(parts, prompt, [each.triggers for each in attached])  # complains early
    conditions = [parse_control(text) for text in controls]
    backbone = open_with_adapters(base, chosen, other_base)
    first = complete(
        backbone, [each.record() for each in chosen], prompt=prompt, negative=negative, seed=seed,
        steps=steps, guidance=guidance, width=width, height=height, regions=regions,
        combine=combine, controls=[each.record() for each in conditions],
    )  # fmt: skip
    controlling = load_controls(backbone, conditions, first.width, first.height)
    target = None if out is None else output_target(Path(out), num)
    images = []
    for done in range(num):
        wanted = replace(first, seed=seed + done)
        parameters = placed(backbone, wanted, attached, controlling)
        image = picture(backbone, parameters, attached, controlling)
        if target is not None:
            path = next_file(target) if target.is_dir() else target
            save_png(image, path, parameters)
            image.info["path"] = str(path)
        images.append(image)
        listen(done + 1)
    return images


def inspect(path: str | Path) -> Adapter:
    """The checked content of an adapter file."""
    return load_adapter(Path(path).expanduser())
