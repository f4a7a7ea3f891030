"""`rite.generate`: pictures of a prompt, with any number of adapters."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from PIL.Image import Image

from rite_diffusion.adapters.choice import choose_adapters, notes, protected_words
from rite_diffusion.api.bases import PLAIN, open_with_adapters
from rite_diffusion.files.writing import print_to_stderr, write_output
from rite_diffusion.generation.attached import as_attached
from rite_diffusion.generation.composition import SUM
from rite_diffusion.generation.control import load_controls, parse_control
from rite_diffusion.generation.metadata import encode_png
from rite_diffusion.generation.output import picture_target, write_next
from rite_diffusion.generation.picture import draw_picture, resolve_boxes, resolve_request
from rite_diffusion.generation.regions import adapter_weights, parse_regions
from rite_diffusion.generation.request import PictureRequest


def generate(
    prompt: str,
    *,
    adapters: Sequence[str | Path] = (),
    regions: Sequence[str] = (),
    region_by: str | None = None,
    combine: str = SUM,
    controls: Sequence[str] = (),
    base: str | None = None,
    seed: int = 0,
    num: int = 1,
    steps: int | None = None,
    guidance: float | None = None,
    negative: str = "",
    width: int | None = None,
    height: int | None = None,
    out: str | Path | None = None,
    other_base: bool = False,
    memory: Mapping[str, str] = PLAIN,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Image]:
    """Pictures of a prompt, for the seeds `seed`, `seed + 1`, …; adapters are `FILE[:WEIGHT]`.

    `regions` are `x0,y0,x1,y1: prompt [:: negative [:: weights]]`, boxes with prompts of their own,
    or `at WORD: prompt ...`, whose box is found where the plain prompt's picture shows that word.
    `region_by` is how they are drawn: `attention`, where a region's cells attend to its own prompt,
    or `predictions`, which are mixed; by default the base's own. `combine` is how several adapters
    act together: `sum`, `switch` or `composite`. `controls` are `MODEL=PICTURE[:WEIGHT]`,
    ControlNets and T2I-Adapters. `steps`, the `guidance` scale, `width` and `height` (pixels)
    default to the base's. Pictures are drawn one at a time, so each depends on its own parameters
    only. With `out`, a folder or for one picture a `.png`, they are written as PNGs that carry
    their parameters, and `image.info["path"]` is the file. Adapters of another base are refused
    unless `other_base`. Where two adapters have an embedding of the same name, the second is
    renamed; a line on stderr says so. `memory` holds settings of a training's `[memory]` table.
    `progress` is called with the number of pictures done. Raises RiteError for what cannot be used.
    """
    request = PictureRequest(
        prompt=prompt, negative=negative, seed=seed, steps=steps, guidance=guidance, width=width,
        height=height, regions=regions, region_by=region_by, combine=combine, controls=controls,
    )  # fmt: skip
    return draw(request, adapters, base=base, num=num, out=out, other_base=other_base,
                memory=memory, progress=progress)  # fmt: skip


def draw(
    request: PictureRequest,
    adapters: Sequence[str | Path] = (),
    *,
    base: str | None = None,
    num: int = 1,
    out: str | Path | None = None,
    other_base: bool = False,
    memory: Mapping[str, str] = PLAIN,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Image]:
    """`num` pictures of a request, with consecutive seeds; arguments are those of `generate`."""
    chosen = choose_adapters(adapters)
    request.check(protected_words(chosen), num)
    conditions = [parse_control(text) for text in request.controls]
    read = [each.path for each in (*chosen, *conditions)]
    target = None if out is None else picture_target(out, num, read)
    for line in notes(chosen):
        print_to_stderr(line)
    attached = as_attached(chosen)
    parts = parse_regions(request.regions, request.prompt)
    # Raises for a wrong number of weights before the base is opened.
    adapter_weights(parts, request.prompt, [each.triggers for each in attached])
    backbone = open_with_adapters(base, chosen, other_base, memory)
    request = replace(request, controls=[each.record() for each in conditions])
    first = resolve_request(backbone, request, [each.record() for each in chosen])
    controlling = load_controls(backbone, conditions, first.width, first.height)
    images = []
    for wanted in first.series(num):
        parameters = resolve_boxes(backbone, wanted, attached, controlling)
        image = draw_picture(backbone, parameters, attached, controlling)
        if target is not None:
            image.info["path"] = str(_write(target, encode_png(image, parameters)))
        images.append(image)
        progress(len(images))
    return images


def _write(target: Path, content: bytes) -> Path:
    """Write a picture as the target, or into it if it is a folder; returns the path."""
    if target.suffix.lower() != ".png" or target.is_dir():
        return write_next(target, content)
    write_output(target, content)
    return target
