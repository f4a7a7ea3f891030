"""The place where pictures form."""

from typing import TYPE_CHECKING

from rite_diffusion.ui.page import picture_html, progress_bar

if TYPE_CHECKING:
    from rite_diffusion.ui.engine import Frame


def opening() -> str:
    """HTML while the model is opened."""
    return f'<div class="stage">{progress_bar(0)}<p>Opening the model…</p></div>'


def forming(frame: "Frame", done: int, count: int) -> str:
    """HTML of the picture that is forming, with how far all of them are."""
    steps = frame.parameters.steps
    share = (done + (0 if frame.path else frame.step / steps)) / count
    text = f"{done} of {count} done"
    if frame.path is None:
        text = f"Picture {done + 1} of {count}, step {frame.step} of {steps}"
    picture = picture_html(frame.image) if frame.image and frame.path is None else ""
    return f'<div class="stage">{picture}{progress_bar(share)}<p>{text}</p></div>'
