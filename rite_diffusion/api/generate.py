"""The whole flow on one screen: a photo folder becomes an adapter, a prompt becomes pictures."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from PIL.Image import Image

from rite_diffusion.adapters.choice import choose_adapters, renamings
from rite_diffusion.api.bases import open_with_adapters
from rite_diffusion.generation.attached import as_attached
from rite_diffusion.generation.composition import SUM
from rite_diffusion.generation.control import load_controls, parse_control
from rite_diffusion.generation.metadata import save_png
from rite_diffusion.generation.output import next_file, output_target
from rite_diffusion.generation.regions import adapter_weights, parse_regions
from rite_diffusion.generation.request import complete, picture, placed


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
