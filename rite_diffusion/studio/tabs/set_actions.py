"""What is done with a whole photo set: a new one, rename, empty, delete, undo. In the Train tab."""

from collections.abc import Callable

import gradio as gr

from rite_diffusion.errors import StudioError
from rite_diffusion.studio.page import show_note, with_messages
from rite_diffusion.studio.state import Studio
from rite_diffusion.studio.tabs.photos import QUIET, PhotoPanel, show_set
from rite_diffusion.studio.workspace import Workspace


def build_set_actions(studio: Studio, panel: PhotoPanel) -> None:
    """Fill the fold below a set's captions, and connect its buttons."""
    with panel.actions:
        with gr.Row(elem_classes="end"):
            title = gr.Textbox("", label="Name of the set", max_length=64, scale=3, min_width=160,
                               elem_id="set-name")  # fmt: skip
            rename = gr.Button("Rename", scale=1, min_width=90, elem_id="rename-set")
        with gr.Row():
            clear = gr.Button("Empty", min_width=80, elem_id="clear-set")
            delete = gr.Button("Delete", variant="stop", min_width=80, elem_id="delete-set")
    for button, act in (
        (panel.fresh, lambda space, name: None),
        (clear, _clear),
        (delete, _delete),
        (panel.undo, _undo),
    ):
        handler = _handler(studio, act)
        button.click(handler, [panel.name, *panel.concept()], panel.outputs(), **QUIET)

    @with_messages
    def rename_it(to: str, name: str, shown: str, trigger: str, noun: str, request: gr.Request):
        from rite_diffusion.studio.photo_sets import rename_set

        space = studio.space(request)
        name = rename_set(space, name, to)
        return show_set(space, name, name, trigger, noun)  # the same set, with its concept

    gr.on(
        [rename.click, title.submit], rename_it, [title, panel.name, *panel.concept()],
        panel.outputs(), **QUIET,
    )  # fmt: skip
    panel.shown.change(lambda name: name, panel.shown, title, **QUIET)


def _handler(studio: Studio, act: Callable[[Workspace, str], str | None]) -> Callable:
    """The handler of a button: `act` on a set, then show the set that it returns."""

    @with_messages
    def handler(name: str | None, shown: str, trigger: str, noun: str, request: gr.Request):
        space = studio.space(request)
        return show_set(space, act(space, name or ""), shown, trigger, noun)

    return handler


def _clear(space: Workspace, name: str) -> str:
    from rite_diffusion.studio.photo_sets import clear_set

    clear_set(space, name)
    show_note(f"'{name}' is empty. Undo brings its photos back.")
    return name


def _delete(space: Workspace, name: str) -> None:
    from rite_diffusion.studio.photo_sets import delete_set

    delete_set(space, name)
    show_note(f"'{name}' is deleted. Undo brings it back.")


def _undo(space: Workspace, name: str) -> str:
    if not space.last_in_trash("photos"):
        raise StudioError("no photo set was deleted last: there is nothing to undo here.")
    return space.restore_from_trash().name
