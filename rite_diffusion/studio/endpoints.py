"""API endpoints: functions whose arguments are checked against their annotations, and files."""

import inspect
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, get_type_hints

import gradio as gr
from pydantic import ConfigDict, TypeAdapter, ValidationError

from rite_diffusion.errors import StudioError
from rite_diffusion.studio.page import checked_upload, link_to, with_messages

FINITE = ConfigDict(allow_inf_nan=False)


# Gradio's clients send files as dictionaries, which `path_in` reads.
_TYPES: dict[Any, Any] = {
    gr.FileData: dict[str, Any],
    list[gr.FileData]: list[dict[str, Any]],
}


def endpoint(handler: Callable) -> Callable:
    """The handler with arguments checked against its annotations; RiteErrors become messages."""
    types = {
        name: TypeAdapter(_TYPES.get(kind, kind), config=FINITE)
        for name, kind in get_type_hints(handler).items()
        if kind is not gr.Request and name != "return"
    }
    names = list(inspect.signature(handler).parameters)

    @wraps(handler)
    def checked(*values: Any):
        named = zip(names, values, strict=False)
        return handler(*(_checked(name, types.get(name), value) for name, value in named))

    return with_messages(checked)


def _checked(name: str, kind: TypeAdapter | None, value: Any) -> Any:
    """The argument in its annotated type; StudioError where it does not fit."""
    try:
        return value if kind is None else kind.validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        place = "".join(f"[{part!r}]" for part in first["loc"])
        raise StudioError(f"{name}{place}: {first['msg'].lower()}") from None


def file_data(path: Path, name: str | None = None) -> Any:
    """The value from which Gradio's clients download a file."""
    return linked(link_to(path, name))


def linked(link: str) -> Any:
    """The value from which Gradio's clients download what `link_to` returned."""
    return {"path": link, "meta": {"_type": "gradio.FileData"}}


def path_in(file: Any) -> Path:
    """The path of an uploaded file, which Gradio passes as a dictionary."""
    path = file.get("path")
    if not isinstance(path, str):
        raise StudioError('a file must be {"path": …} of an upload: send the file first.')
    return checked_upload(path)
