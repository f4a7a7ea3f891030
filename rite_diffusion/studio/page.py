"""Pieces of the page: errors in words, text that is no markup, pictures that keep their bytes."""

import base64
import hmac
import inspect
import io
import secrets
import shutil
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder
from PIL import Image

from rite_diffusion.errors import RiteError, StudioError
from rite_diffusion.files.writing import printable, user_path

_SECRET = secrets.token_bytes()
LONGEST = 600  # characters of a message


def with_messages(handler: Callable) -> Callable:
    """The handler, whose RiteErrors become messages on the page instead of tracebacks."""
    if inspect.isgeneratorfunction(handler):

        @wraps(handler)
        def generator(*values: Any):
            try:
                yield from handler(*values)
            except RiteError as error:
                raise _message(error) from None

        return generator

    @wraps(handler)
    def function(*values: Any):
        try:
            return handler(*values)
        except RiteError as error:
            raise _message(error) from None

    return function


def _message(error: RiteError) -> gr.Error:
    """The error as Gradio shows it; it would take the text for HTML."""
    text = printable(str(error))
    if len(text) > LONGEST:  # what was found and, at the end, what to do
        text = f"{text[: LONGEST - 203]} … {text[-200:]}"
    words = escape(text[:1].upper() + text[1:], quote=False)
    return gr.Error(words, title="That did not work", print_exception=False)


def tell(text: str) -> None:
    """Show a note."""
    gr.Info(escape(printable(text)))


def shown(path: Path, name: str | None = None) -> str:
    """A link to a workspace's file that the page may fetch, in a folder that nobody can guess.

    The workspace itself is not served; and a picture that is passed as its path keeps its bytes,
    parameters included. `name` is what the link is called.
    """
    stat = path.stat()
    facts = f"{path} {stat.st_mtime_ns} {stat.st_size}"
    folder = hmac.new(_SECRET, facts.encode(), "sha256").hexdigest()
    link = Path(get_upload_folder()) / folder / (name or path.name)
    if not link.exists():
        link.parent.mkdir(parents=True, exist_ok=True)
        try:
            link.hardlink_to(path)
        except OSError:  # another disk, or a disk without links
            shutil.copyfile(path, link)
    return str(link)


def shown_all(paths: Iterable[Path]) -> list[str]:
    """`shown` of each."""
    return [shown(path) for path in paths]


def uploaded(path: str | Path) -> Path:
    """The path, if it lies where uploads are kept; StudioError otherwise."""
    complete = user_path(path).resolve()
    if not complete.is_relative_to(Path(get_upload_folder()).resolve()) or not complete.is_file():
        raise StudioError("that file was not uploaded here: send it with the request.")
    return complete


def empty_state(title: str, text: str) -> str:
    """HTML for a place that is still empty: what to do first."""
    return f'<div class="empty"><b>{escape(title)}</b><span>{escape(text)}</span></div>'


def progress_bar(share: float) -> str:
    """HTML of a bar that is full at 1."""
    width = 100 * min(max(share, 0.0), 1.0)
    return f'<div class="bar"><i style="width:{width:.1f}%"></i></div>'


def picture_html(image: Image.Image) -> str:
    """HTML of a picture that need not be kept."""
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=85)
    data = base64.b64encode(stream.getvalue()).decode()
    return f'<img alt="" src="data:image/jpeg;base64,{data}">'


def facts_html(facts: Sequence[tuple[str, str]]) -> str:
    """HTML of names and values; those without a value are left out."""
    rows = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts if v)
    return f'<dl class="facts">{rows}</dl>'
