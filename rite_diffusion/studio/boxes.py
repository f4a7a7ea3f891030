"""Boxes on the Generate tab's canvas, as texts of `rite generate --region` and as HTML."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Any

from rite_diffusion.errors import StudioError

MAX_BOXES = 8
SMALLEST = 0.05  # least width and height of a box, as fractions of the picture's
COLOURS = (
    "#6254e8", "#0a7a55", "#b45309", "#d11a1a", "#0369a1", "#be185d", "#4d7c0f", "#5b6b82",
)  # fmt: skip
KEYS = (
    "Boxes of the picture. Arrow keys move one, with Shift they resize it; Enter edits its prompt."
)
BY_WORDS, NONE = "by the words of its prompt", "none: the base alone"  # instead of an adapter


@dataclass(frozen=True)
class Box:
    """A part of the picture, in fractions of its sides, and what is drawn there."""

    left: float
    top: float
    right: float
    bottom: float
    prompt: str = ""
    negative: str = ""
    adapter: str = BY_WORDS  # a name of the library, BY_WORDS or NONE

    @property
    def corners(self) -> tuple[float, float, float, float]:
        """Left, top, right, bottom."""
        return self.left, self.top, self.right, self.bottom

    def weights(self, adapters: Sequence[str]) -> tuple[float, ...] | None:
        """Each adapter's factor in the box; None: the triggers in the prompt decide."""
        if self.adapter == BY_WORDS or not adapters:
            return None
        if self.adapter not in (NONE, *adapters):
            raise StudioError(f"'{self.adapter}' is not among the adapters: choose it there too.")
        return tuple(float(name == self.adapter) for name in adapters)


def colour_of(index: int) -> str:
    """The colour of a box by its index."""
    return COLOURS[index % len(COLOURS)]


def checked_corners(sides: Sequence[float]) -> dict[str, Any]:
    """Left, top, right and bottom by name, clipped to the picture; StudioError if too small."""
    left, top, right, bottom = (min(max(round(float(side), 3), 0.0), 1.0) for side in sides)
    if not (right - left >= SMALLEST and bottom - top >= SMALLEST):  # nor for NaN
        raise StudioError("that box is too small: drag from corner to corner.")
    return {"left": left, "top": top, "right": right, "bottom": bottom}


def read_corners(text: str) -> dict[str, Any]:
    """`checked_corners` of four numbers with commas between them."""
    try:
        left, top, right, bottom = (float(part) for part in text.split(","))
    except ValueError:
        raise StudioError(
            f"'{text}' is not a box: write left, top, right, bottom as fractions: 0, 0, 0.5, 1"
        ) from None
    return checked_corners([left, top, right, bottom])


def side_by_side(boxes: Sequence[Box]) -> list[Box]:
    """The boxes as columns of equal width; empty boxes are added up to two."""
    empty = [Box(0, 0, 1, 1)] * (2 - len(boxes))
    columns = [*boxes, *empty]
    edges = [round(index / len(columns), 3) for index in range(len(columns) + 1)]
    return [
        replace(box, left=left, top=0.0, right=right, bottom=1.0)
        for box, left, right in zip(columns, edges, edges[1:], strict=False)
    ]


def region_texts(boxes: Sequence[Box], adapters: Sequence[str]) -> tuple[str, ...]:
    """The boxes as texts for `rite generate --region`; StudioError for a box without prompt."""
    from rite_diffusion.generation.regions import Region, parse_region

    texts = []
    for number, box in enumerate(boxes, 1):
        if not box.prompt.strip():
            raise StudioError(f"box {number} has no prompt: click it and write what it shows.")
        if "::" in box.prompt + box.negative:
            raise StudioError(
                f"box {number}: '::' separates prompt and negative prompt: leave it out."
            )
        prompt, negative = " ".join(box.prompt.split()), " ".join(box.negative.split())
        region = Region(*box.corners, prompt, negative, box.weights(adapters))
        texts.append(str(parse_region(str(region))))
    return tuple(texts)


def boxes_of(regions: Sequence[str], adapters: Sequence[str]) -> list[Box]:
    """The boxes of a picture's regions; `adapters` are the names of its adapters, in order.

    A box has one adapter: the one with the largest weight in the region.
    """
    from rite_diffusion.generation.regions import parse_region

    boxes = []
    for region in map(parse_region, regions):
        adapter = BY_WORDS
        if region.weights and adapters:
            sizes = dict(zip(adapters, map(abs, region.weights), strict=False))
            largest = max(sizes, key=lambda name: sizes[name])
            adapter = (largest or BY_WORDS) if sizes[largest] else NONE
        corners = region.left, region.top, region.right, region.bottom
        boxes.append(Box(*corners, region.prompt, region.negative, adapter))
    return boxes


def canvas_html(boxes: Sequence[Box], picked: int) -> str:
    """HTML of the canvas; `picked` is the index of the box that is edited, or -1."""
    shapes = "".join(_shape(box, index, index == picked) for index, box in enumerate(boxes))
    hint = "" if boxes else "<span>Drag here to draw a box</span>"
    inside = f'{hint}{shapes}<i class="band"></i>'
    return f'<div class="pad" role="group" aria-label="{KEYS}">{inside}</div>'


def _shape(box: Box, index: int, picked: bool) -> str:
    left, top = 100 * box.left, 100 * box.top
    width, height = 100 * (box.right - box.left), 100 * (box.bottom - box.top)
    place = f"left:{left:g}%;top:{top:g}%;width:{width:g}%;height:{height:g}%"
    words = escape(box.prompt) or "<em>what is here?</em>"
    named = box.adapter not in (BY_WORDS, NONE)
    adapter = f"<small>{escape(box.adapter)}</small>" if named else ""
    corners = ",".join(f"{side:g}" for side in box.corners)
    said = f"Box {index + 1}: {box.prompt or 'no prompt yet'}. {left:.0f} % from the left, "
    said += f"{top:.0f} % from the top, {width:.0f} % wide, {height:.0f} % high"
    return (
        f'<div class="box{" picked" if picked else ""}" tabindex="0" role="button" '
        f'aria-label="{escape(said)}" data-index="{index}" '
        f'data-box="{corners}" style="{place};--colour:{colour_of(index)}">'
        f"<p><b>{index + 1}</b>{words}{adapter}</p><i class='grip'></i></div>"
    )
