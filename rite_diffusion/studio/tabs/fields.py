"""The fields of a picture's parameters, and the requests made from their values."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import gradio as gr

from rite_diffusion.errors import StudioError

if TYPE_CHECKING:
    from rite_diffusion.generation.request import PictureRequest

MAX_PICTURES = 16


@dataclass(frozen=True)
class Fields:
    """The fields of a picture's parameters, without adapters and regions."""

    prompt: gr.Textbox
    negative: gr.Textbox
    seed: gr.Number
    fresh: gr.Checkbox
    count: gr.Slider
    steps: gr.Textbox
    guidance: gr.Textbox
    width: gr.Textbox
    height: gr.Textbox
    base: gr.Textbox

    def all(self) -> list[Any]:
        """The components in order."""
        return [getattr(self, field.name) for field in fields(self)]


def optional_number(label: str, name: str) -> gr.Textbox:
    """A field for a number that may stay empty; a gr.Number would show and send 0 instead."""
    return gr.Textbox(
        value="",
        label=label,
        placeholder="auto",
        max_lines=1,
        max_length=12,
        min_width=80,
        elem_id=name,
    )


def whole_number(text: str, label: str) -> int | None:
    """The whole number in an optional field, None where it is empty; StudioError otherwise."""
    if not text.strip():
        return None
    try:
        return int(text)
    except ValueError:
        raise StudioError(f"{label} must be a whole number, not '{text}', or empty.") from None


def decimal(text: str, label: str) -> float | None:
    """The number in an optional field, None where it is empty; StudioError otherwise."""
    try:
        value = float(text) if text.strip() else None
    except ValueError:
        value = math.nan
    if value is not None and not math.isfinite(value):
        raise StudioError(f"{label} must be a number, not '{text}', or empty.")
    return value


def lay_out_fields(prompt: gr.Textbox) -> Fields:
    """Make all fields but the prompt, which exists already."""
    negative = gr.Textbox("", label="Negative prompt", placeholder="what to avoid", max_lines=4)
    with gr.Row():
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**32 - 1, min_width=110)
        fresh = gr.Checkbox(True, label="New seed each time", min_width=150)
    with gr.Row():
        count = gr.Slider(1, MAX_PICTURES, value=4, step=1, label="Pictures", min_width=140)
        steps = optional_number("Steps", "denoising-steps")
    with gr.Accordion("Size, guidance, base model", open=False):
        with gr.Row():
            width = optional_number("Width", "width")
            height = optional_number("Height", "height")
            guidance = optional_number("Guidance", "guidance")
        base = gr.Textbox("", label="Base model", placeholder="the adapters' own, else pocket")
        gr.HTML("<small>Empty fields take the base model's defaults.</small>")
    return Fields(prompt, negative, seed, fresh, count, steps, guidance, width, height, base)


def named(values: Sequence[Any]) -> dict[str, Any]:
    """The fields' values, given in their order, by name."""
    return dict(zip([field.name for field in fields(Fields)], values, strict=True))


def requests_of(wanted: dict[str, Any], regions: tuple[str, ...] = ()) -> list["PictureRequest"]:
    """The requests of the fields' values, with consecutive seeds."""
    from rite_diffusion.generation.request import PictureRequest

    count = min(max(int(wanted["count"]), 1), MAX_PICTURES)
    first = random.randrange(2**31) if wanted["fresh"] else int(wanted["seed"] or 0)
    kept = {key: wanted[key] for key in ("prompt", "negative")}
    sizes: dict[str, Any] = {key: whole_number(wanted[key], key) for key in ("width", "height")}
    guidance = decimal(wanted["guidance"], "guidance")
    steps = whole_number(wanted["steps"], "steps")
    request = PictureRequest(
        **kept, **sizes, guidance=guidance, seed=first, steps=steps, regions=regions
    )
    return request.series(count)
