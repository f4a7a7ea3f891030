"""Pictures in progress, as the tabs that draw show them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import gradio as gr

from rite_diffusion.studio.page import empty_state, picture_html, progress_bar, show_note
from rite_diffusion.studio.state import Studio
from rite_diffusion.studio.workspace import Workspace

if TYPE_CHECKING:
    from rite_diffusion.generation.request import PictureRequest
    from rite_diffusion.studio.engine import Frame


@dataclass(frozen=True)
class DrawingPanel:
    """Components that show the picture in progress, finished ones, and a clicked one's facts."""

    idle: str  # HTML of the stage before the first picture
    stage: gr.HTML
    made: gr.Gallery
    names: gr.State  # of the pictures in `made`
    facts: gr.HTML


def lay_out_drawing(title: str, text: str, name: str) -> DrawingPanel:
    """The panel; `title` and `text` fill it before the first picture, `name` begins its ids."""
    idle = empty_state(title, text)
    stage = gr.HTML(idle, elem_id=f"{name}stage")
    made = gr.Gallery(
        label="Pictures", columns=4, height="auto", object_fit="contain", visible=False,
        buttons=["download", "fullscreen"], elem_id=f"{name}made", interactive=False,
    )  # fmt: skip
    facts = gr.HTML("", elem_id=f"{name}facts")
    return DrawingPanel(idle, stage, made, gr.State([]), facts)


@dataclass(frozen=True)
class Drawn:
    """Progress of a drawing: HTML of the stage, and the finished pictures."""

    stage: str
    done: list[Path]


def drawing(
    studio: Studio,
    space: Workspace,
    requests: Sequence["PictureRequest"],
    adapters: Sequence[str],
    base: str,
) -> Iterator[Drawn]:
    """The drawing's progress, each time that there is something new to show."""
    done: list[Path] = []
    yield Drawn(waiting_html("Opening the model…"), [])
    for frame in studio.engine.draw(space, requests, show_note, adapters, base):
        if frame.path is not None:
            done = [*done, frame.path]
        if frame.path is not None or frame.image is not None:
            yield Drawn(_stage(frame, len(done), len(requests)), done)
    yield Drawn("", done)


def waiting_html(text: str, share: float = 0.0) -> str:
    """HTML of a text with a progress bar; `share` is from 0 to 1."""
    return f'<div class="stage">{progress_bar(share)}<p>{text}</p></div>'


def _stage(frame: "Frame", done: int, count: int) -> str:
    """HTML of the picture in progress, with the progress of all of them."""
    steps = frame.parameters.steps
    share = (done + (0 if frame.path else frame.step / steps)) / count
    text = f"Picture {done + 1} of {count}, step {frame.step} of {steps}"
    if frame.path is not None:
        text = f"{done} of {count} done"
    picture = picture_html(frame.image) if frame.image else ""
    return f'<div class="stage">{picture}{progress_bar(share)}<p>{text}</p></div>'
