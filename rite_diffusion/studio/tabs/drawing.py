"""Pictures as they form: what the tabs that draw show while the engine works."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import gradio as gr

from rite_diffusion.studio.page import empty_state, picture_html, progress_bar, tell
from rite_diffusion.studio.state import Studio
from rite_diffusion.studio.workspace import Workspace

if TYPE_CHECKING:
    from rite_diffusion.generation.request import PictureRequest
    from rite_diffusion.studio.engine import Frame


@dataclass(frozen=True)
class Easel:
    """Where pictures appear: the one that forms, those that are done, and what a click tells."""

    idle: str  # what the stage says while there is nothing to see
    stage: gr.HTML
    made: gr.Gallery
    names: gr.State  # of the pictures in `made`
    facts: gr.HTML


def lay_out_easel(title: str, text: str, name: str) -> Easel:
    """An easel that says what to do first; `name` begins its elements' ids."""
    idle = empty_state(title, text)
    stage = gr.HTML(idle, elem_id=f"{name}stage")
    made = gr.Gallery(
        label="Pictures", columns=4, height="auto", object_fit="contain", visible=False,
        buttons=["download", "fullscreen"], elem_id=f"{name}made", interactive=False,
    )  # fmt: skip
    facts = gr.HTML("", elem_id=f"{name}facts")
    return Easel(idle, stage, made, gr.State([]), facts)


@dataclass(frozen=True)
class Drawn:
    """How far a drawing is: what the stage says, and the pictures that are done."""

    stage: str
    done: list[Path]


def drawing(
    studio: Studio,
    space: Workspace,
    requests: Sequence["PictureRequest"],
    adapters: Sequence[str],
    base: str,
) -> Iterator[Drawn]:
    """Tells whenever there is something new to see."""
    done: list[Path] = []
    yield Drawn(waiting_html("Opening the model…"), [])
    for frame in studio.engine.draw(space, requests, tell, adapters, base):
        if frame.path is not None:
            done = [*done, frame.path]
        if frame.path is not None or frame.image is not None:
            yield Drawn(_stage(frame, len(done), len(requests)), done)
    yield Drawn("", done)


def waiting_html(text: str, share: float = 0.0) -> str:
    """What is awaited, with a bar."""
    return f'<div class="stage">{progress_bar(share)}<p>{text}</p></div>'


def _stage(frame: "Frame", done: int, count: int) -> str:
    """The picture that is forming, with how far all of them are."""
    steps = frame.parameters.steps
    share = (done + (0 if frame.path else frame.step / steps)) / count
    text = f"Picture {done + 1} of {count}, step {frame.step} of {steps}"
    if frame.path is not None:
        text = f"{done} of {count} done"
    picture = picture_html(frame.image) if frame.image else ""
    return f'<div class="stage">{picture}{progress_bar(share)}<p>{text}</p></div>'
