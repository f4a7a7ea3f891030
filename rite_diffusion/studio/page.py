"""Parts of the page: messages, links to files, checks of uploads, and pieces of HTML."""

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
    """The handler with its RiteErrors turned into messages on the page."""
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
    """The error for Gradio, with its text escaped, as Gradio renders HTML."""
    text = printable(str(error))
    if len(text) > LONGEST:  # keeps the end, which says what to do
        text = f"{text[: LONGEST - 203]} … {text[-200:]}"
    words = escape(text[:1].upper() + text[1:], quote=False)
    return gr.Error(words, title="That did not work", print_exception=False)


def show_note(text: str) -> None:
    """Show a note on the page."""
    gr.Info(escape(printable(text)))


def link_to(path: Path, name: str | None = None) -> str:
    """A path from which the page may fetch a workspace's file, in a folder with a secret name.

    The workspace itself is not served. Gradio sends a file that is given by its path unchanged, so
    pictures keep their parameters. `name` defaults to the file's.
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


def links_to(paths: Iterable[Path]) -> list[str]:
    """`link_to` each."""
    return [link_to(path) for path in paths]


def checked_upload(path: str | Path) -> Path:
    """The absolute path of an uploaded file; StudioError for any other path."""
    complete = user_path(path).resolve()
    if not complete.is_relative_to(Path(get_upload_folder()).resolve()) or not complete.is_file():
        raise StudioError("that file was not uploaded here: send it with the request.")
    return complete


def connect_upload(
    drop: gr.File | gr.UploadButton,
    handler: Callable,
    inputs: Sequence[Any],
    outputs: Sequence[Any],
) -> None:
    """Call `handler` at an upload, and empty the field afterwards, also where the upload fails.

    A field that keeps a refused file would send it again with the next one. What `outputs` show
    stays where the upload fails: after an exception, Gradio would write "Error" over each.
    """

    @wraps(handler)
    def add(*values: Any):
        try:
            return handler(*values)
        except gr.Error as error:  # of `with_messages`, escaped
            gr.Warning(error.message, title="Not taken")
            return [gr.skip()] * len(outputs)

    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    event = drop.upload(add, list(inputs), list(outputs), **quiet)
    for ended in (event.success, event.failure):
        ended(lambda: None, None, drop, **quiet)


def empty_state(title: str, text: str) -> str:
    """HTML that fills an empty place and says what to do first."""
    return f'<div class="empty"><b>{escape(title)}</b><span>{escape(text)}</span></div>'


def progress_bar(share: float) -> str:
    """HTML of a progress bar; `share` is from 0 to 1."""
    width = 100 * min(max(share, 0.0), 1.0)
    return f'<div class="bar"><i style="width:{width:.1f}%"></i></div>'


def picture_html(image: Image.Image) -> str:
    """HTML of a picture, embedded as a JPEG."""
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=85)
    data = base64.b64encode(stream.getvalue()).decode()
    return f'<img alt="" src="data:image/jpeg;base64,{data}">'


def facts_html(facts: Sequence[tuple[str, str]]) -> str:
    """HTML of (name, value) pairs; those with an empty value are left out."""
    rows = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts if v)
    return f'<dl class="facts">{rows}</dl>'
