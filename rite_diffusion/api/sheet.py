"""`rite.grid`: sheets of pictures over prompts, adapters, weights, methods and seeds."""

import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from io import BytesIO
from pathlib import Path

from PIL import PngImagePlugin
from PIL.Image import Image

from rite_diffusion._version import __version__
from rite_diffusion.adapters import Adapter
from rite_diffusion.adapters.attach import OR_OTHER_BASE, attach, check_base, detach
from rite_diffusion.adapters.choice import (
    Chosen,
    choose_adapters,
    notes,
    protected_words,
    split_weight,
)
from rite_diffusion.api.bases import open_base
from rite_diffusion.api.fuse import with_plain_updates
from rite_diffusion.api.sketch import with_sketches
from rite_diffusion.backbones.protocols import Backbone
from rite_diffusion.errors import ConfigError
from rite_diffusion.files.writing import check_outputs, file_output, print_to_stderr, write_output
from rite_diffusion.fusion import FUSIONS
from rite_diffusion.fusion.loss import describe_loss
from rite_diffusion.fusion.members import Member, check_and_sort
from rite_diffusion.fusion.merge import merge_with_loss, method_named
from rite_diffusion.fusion.settings import FusionSettings
from rite_diffusion.fusion.statistics import DEFAULT_DRAWING
from rite_diffusion.generation.attached import Attached
from rite_diffusion.generation.composition import COMPOSITIONS, SUM
from rite_diffusion.generation.grid import labelled_grid
from rite_diffusion.generation.metadata import KEY
from rite_diffusion.generation.picture import draw_picture, resolve_request
from rite_diffusion.generation.request import PictureRequest
from rite_diffusion.seeding import check_seed

AXES = ("prompt", "adapter", "weight", "method", "seed")
ATTACHED = "attached"  # the method that attaches all adapters, without fusing
UNFUSED = (ATTACHED, *COMPOSITIONS)
METHODS = (*UNFUSED, *FUSIONS)
MAX_CELLS = 2500  # pictures on a sheet
NAME = "sheet"


@dataclass(frozen=True)
class Cell:
    """The values that decide one picture of a sheet."""

    prompt: str
    adapter: tuple[str, ...]  # FILE[:WEIGHT] items; none for the base alone
    weight: float  # factor on the items' weights
    method: str
    seed: int

    def label(self, axis: str) -> str:
        """The label of the cell's value on an axis."""
        if axis == "adapter":
            return " + ".join(map(_adapter_label, self.adapter)) or "base alone"
        value = getattr(self, axis)
        return {"weight": f"weight {value}", "seed": f"seed {value}"}.get(axis, str(value))

    def chosen(self) -> list[Chosen]:
        """The adapters, their weights multiplied by the cell's."""
        items = choose_adapters(self.adapter)
        return [replace(each, weight=each.weight * self.weight) for each in items]


def _items(adapters: str | Sequence[str]) -> tuple[str, ...]:
    """`FILE[:WEIGHT]` items of a sequence, or of a text with + between them."""
    items = _split_items(adapters) if isinstance(adapters, str) else adapters
    return tuple(item for item in items if item)


def _split_items(text: str) -> list[str]:
    """The items of a text: each the longest that names a file, as names may contain a +."""
    pieces, items = text.split("+"), list[str]()
    while pieces:
        joined = ["+".join(pieces[:count]) for count in range(len(pieces), 0, -1)]
        item = next((each for each in joined if os.path.exists(split_weight(each)[0])), pieces[0])
        items.append(item)
        del pieces[: item.count("+") + 1]
    return items


def _adapter_label(item: str) -> str:
    """The name of an adapter's file, or of its run for `adapter.safetensors`, and its weight."""
    path, weight = split_weight(item)
    name = path.resolve().parent.name if path.name == "adapter.safetensors" else path.stem
    return name if weight == 1 else f"{name}:{weight:g}"


@dataclass(frozen=True)
class Sheet:
    """The cells of a sheet in rows, and the axes that label rows and columns."""

    rows: list[list[Cell]]
    row_axes: list[str]
    column_axis: str

    def cells(self) -> list[Cell]:
        """All cells, row by row."""
        return [cell for row in self.rows for cell in row]

    def setups(self) -> dict[Cell, list[Cell]]:
        """First cell -> all cells with the same adapters, weight and method."""
        groups: dict[tuple, list[Cell]] = {}
        for cell in self.cells():
            groups.setdefault((cell.adapter, cell.weight, cell.method), []).append(cell)
        return {cells[0]: cells for cells in groups.values()}

    def row_labels(self) -> list[str]:
        """A label for each row, of the axes that distinguish rows."""
        return [", ".join(row[0].label(axis) for axis in self.row_axes) for row in self.rows]

    def column_labels(self) -> list[str]:
        """A label for each column."""
        return [cell.label(self.column_axis) for cell in self.rows[0]]


def plan_sheet(values: dict[str, Sequence], columns: str) -> Sheet:
    """The sheet of every combination of the axes' values; `columns` is the axis of the columns.

    Rows are the combinations of the other axes; of these, axes with several values are their
    labels. Raises ConfigError for an axis without values and for values out of range.
    """
    if columns not in AXES:
        raise ConfigError(f"no axis '{columns}': choose one of {', '.join(AXES)}")
    for axis in AXES:
        if not values[axis]:
            raise ConfigError(f"the sheet has no {axis}: give at least one")
    for method in values["method"]:
        if method not in UNFUSED:
            method_named(method)
    for weight in values["weight"]:
        if not -10 <= weight <= 10:
            raise ConfigError(f"weight {weight} is not between -10 and 10")
    for seed in values["seed"]:
        check_seed(seed)
    values = values | {"adapter": [_items(each) for each in values["adapter"]]}
    down = [axis for axis in AXES if axis != columns]
    points = [
        dict(zip(down, point, strict=True))
        for point in itertools.product(*(values[axis] for axis in down))
    ]
    rows = [[Cell(**point, **{columns: value}) for value in values[columns]] for point in points]
    if len(rows) * len(rows[0]) > MAX_CELLS:
        raise ConfigError(f"{len(rows)} x {len(rows[0])} pictures are more than {MAX_CELLS}")
    varied = [axis for axis in down if len(values[axis]) > 1]
    return Sheet(rows, varied or ["prompt"], columns)


def grid(
    prompts: Sequence[str],
    *,
    adapters: Sequence[str | Sequence[str]] = ("",),
    weights: Sequence[float] = (1.0,),
    methods: Sequence[str] = (ATTACHED,),
    seeds: Sequence[int] = (0,),
    columns: str = "seed",
    base: str | Backbone | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    negative: str = "",
    width: int | None = None,
    height: int | None = None,
    cell: int = 192,
    out: str | Path | None = None,
    other_base: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
    on_note: Callable[[str], None] = print_to_stderr,
) -> Image:
    """A sheet of pictures of all combinations of the arguments.

    Each of `adapters` is a `FILE[:WEIGHT]`, several in a list or joined by `+`, or "" for the base
    alone; each of `weights` multiplies theirs; each of `methods` is how several are combined:
    `attached`, `switch`, `composite` or a method of fusing. `columns` is the axis of the columns:
    prompt, adapter, weight, method or seed. `steps`, the `guidance` scale, `width` and `height`
    (pixels) default to the base's; `cell` is a picture's side on the sheet in pixels. With `out`,
    the sheet is written as a `.png` that carries every picture's parameters. `progress` is called
    with the pictures done and their number, `on_note` with a line about each weight without effect,
    renamed embedding and loss of a fusion, by default printed on stderr. Raises RiteError for
    values, files and bases that cannot be used.
    """
    values = (prompts, adapters, weights, methods, seeds)
    sheet = plan_sheet(dict(zip(AXES, values, strict=True)), columns)
    if not 32 <= cell <= 1024:
        raise ConfigError(f"cells of {cell} pixels are not between 32 and 1024")
    setups = [each.chosen() for each in sheet.setups()]
    every = [chosen for setup in setups for chosen in setup]
    request = PictureRequest(
        prompt="", negative=negative, steps=steps, guidance=guidance, width=width, height=height
    )
    for prompt in prompts:
        replace(request, prompt=prompt).check(protected_words(every))
    named = [chosen.adapter for chosen in every]
    target = None if out is None else file_output(out, ".png")
    if target is not None:
        check_outputs([target], sources=[chosen.path for chosen in every])
    backbone = open_base(base, [adapter.info for adapter in named])
    for adapter in [] if other_base else named:
        check_base(backbone, adapter, remedy=OR_OTHER_BASE)
    for line in dict.fromkeys(line for setup in setups for line in notes(setup)):
        on_note(line)
    pictures = _draw(backbone, sheet, request, progress, on_note)
    rows = [[pictures[each][0] for each in row] for row in sheet.rows]
    image = labelled_grid(rows, sheet.row_labels(), sheet.column_labels(), cell)
    if target is not None:
        facts = [[asdict(each) | pictures[each][1] for each in row] for row in sheet.rows]
        _write(target, image, _text(sheet, facts))
    return image


def _write(target: Path, image: Image, text: PngImagePlugin.PngInfo) -> None:
    """Write a sheet with its text, and set `image.info["path"]`."""
    stream = BytesIO()
    image.save(stream, "PNG", pnginfo=text)
    write_output(target, stream.getvalue())
    image.info["path"] = str(target)


def _text(sheet: Sheet, facts: list[list[dict]]) -> PngImagePlugin.PngInfo:
    """The PNG's text: the axes, and every picture's parameters row by row."""
    info = PngImagePlugin.PngInfo()
    axes = {"rows": sheet.row_axes, "columns": sheet.column_axis}
    content = {"version": __version__, **axes, "pictures": facts}
    info.add_text(f"{KEY}_grid", json.dumps(content))
    return info


def _draw(
    backbone: Backbone,
    sheet: Sheet,
    request: PictureRequest,
    progress: Callable[[int, int], None],
    on_note: Callable[[str], None],
) -> dict[Cell, tuple[Image, dict]]:
    """Each cell's picture and parameters; adapters are attached once for all their cells."""
    total = len(sheet.cells())
    drawn: dict[Cell, tuple[Image, dict]] = {}
    for first, cells in sheet.setups().items():
        chosen = first.chosen()
        records = [each.record() for each in chosen]
        combine = first.method if first.method in COMPOSITIONS else SUM
        present = _adapters_to_attach(backbone, chosen, first.method, on_note)
        with _attached(backbone, present) as attached:
            for cell in cells:
                wanted = replace(request, prompt=cell.prompt, seed=cell.seed, combine=combine)
                facts = resolve_request(backbone, wanted, records)
                drawn[cell] = draw_picture(backbone, facts, attached), asdict(facts)
                progress(len(drawn), total)
    return drawn


def _adapters_to_attach(
    backbone: Backbone, chosen: list[Chosen], method: str, on_note: Callable[[str], None]
) -> list[tuple[Adapter, float]]:
    """The adapters to attach, with weights: the chosen ones, or the one that a method fuses."""
    if method in UNFUSED or len(chosen) < 2:
        return [(each.adapter, each.weight) for each in chosen]
    members = check_and_sort([Member(each.adapter, each.weight, each.path) for each in chosen])
    members = with_plain_updates(members, lambda: backbone)
    if FUSIONS[method].statistics:
        members = with_sketches(
            members, lambda: backbone, DEFAULT_DRAWING, lambda done, total: None
        )
    fused = merge_with_loss(members, method, FusionSettings())
    if fused.loss:
        names = " + ".join(member.file.name for member in members)
        on_note(f"{method} of {names}: {describe_loss(fused.loss)}")
    return [(fused.adapter, 1.0)]


@contextmanager
def _attached(backbone: Backbone, present: list[tuple[Adapter, float]]) -> Iterator[list[Attached]]:
    """The adapters, attached to the backbone until the block ends."""
    attached = [
        Attached(f"{NAME}_{index}", weight, adapter.info.triggers())
        for index, (adapter, weight) in enumerate(present)
    ]
    for (adapter, weight), place in zip(present, attached, strict=True):
        attach(backbone, adapter, place.name, weight)
    try:
        yield attached
    finally:
        for place in attached:
            detach(backbone, place.name)
