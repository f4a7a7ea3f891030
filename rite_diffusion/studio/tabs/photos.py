"""Photo sets: upload, thumbnails, captions. The first half of the Train tab."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
from PIL import Image

from rite_diffusion.errors import StudioError
from rite_diffusion.studio.page import (
    checked_upload,
    connect_upload,
    empty_state,
    show_note,
    with_messages,
)
from rite_diffusion.studio.state import Studio
from rite_diffusion.studio.tabs import Refresh
from rite_diffusion.studio.workspace import Workspace

if TYPE_CHECKING:
    from rite_diffusion.studio.photo_sets import CaptionedPhoto

NOTHING_PICKED = "Remove a photo: click it first"
THUMBNAIL = 224  # pixels of the longer side
NO_PHOTOS = empty_state(
    "Start with five to ten photos of one thing",
    "Vary background and distance. Drop them above, with captions as .txt files of the same names "
    "if you have them, or try the example.",
)

FILES = ["image", ".zip", ".txt", ".caption"]
QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}


@dataclass(frozen=True)
class PhotoPanel:
    """The components that show a photo set and name its concept."""

    name: gr.Dropdown
    drop: gr.File
    example: gr.Button
    empty: gr.HTML
    thumbnails: gr.Gallery
    captions: gr.Dataframe
    remove: gr.Button
    join: gr.UploadButton
    actions: gr.Accordion
    undo: gr.Button
    fresh: gr.Button
    trigger: gr.Textbox
    class_noun: gr.Textbox
    shown: gr.State  # name of the set that is shown, "" for none

    def concept(self) -> list[Any]:
        """What `show_set` needs to know of the set that was shown before."""
        return [self.shown, self.trigger, self.class_noun]

    def outputs(self) -> list[Any]:
        """The components that show a set; `show_set` has their values."""
        return [
            self.name, self.empty, self.thumbnails, self.captions, self.remove, self.join,
            self.actions, self.undo, self.fresh, *self.concept(),
        ]  # fmt: skip


def build_photos(studio: Studio) -> tuple[PhotoPanel, Refresh]:
    """Make the components and connect their events."""
    panel = _lay_out()
    _connect_adding(studio, panel)
    _connect_editing(studio, panel)

    @with_messages
    def choose(name: str | None, shown: str, trigger: str, noun: str, request: gr.Request):
        return show_set(studio.space(request), name, shown, trigger, noun)

    inputs = [panel.name, *panel.concept()]
    panel.name.input(choose, inputs, panel.outputs(), **QUIET)
    return panel, Refresh(choose, panel.outputs(), inputs)


def _connect_adding(studio: Studio, panel: PhotoPanel) -> None:
    @with_messages
    def make(files: list[str], shown: str, trigger: str, noun: str, request: gr.Request):
        from rite_diffusion.studio.photo_sets import new_set

        space = studio.space(request)
        folder, faults = new_set(space, [str(checked_upload(file)) for file in files], "")
        _tell(faults)
        return show_set(space, folder.name, shown, trigger, noun)

    @with_messages
    def join(files: list[str], name: str, shown: str, trigger: str, noun: str, request: gr.Request):
        from rite_diffusion.studio.uploads import save_photos

        space = studio.space(request)
        folder = space.find("photos", name or "")
        _tell(save_photos([str(checked_upload(file)) for file in files], folder))
        return show_set(space, folder.name, shown, trigger, noun)

    @with_messages
    def add_example(request: gr.Request):
        from rite_diffusion.api.demo import example_photos
        from rite_diffusion.studio.photo_sets import new_set

        space = studio.space(request)
        files = [str(path) for path in sorted(example_photos("robot").iterdir())]
        folder, _ = new_set(space, files, "robot")
        return [*show_set(space, folder.name, "", "", "")[:-2], "<robot>", "robot"]

    connect_upload(panel.drop, make, [panel.drop, *panel.concept()], panel.outputs())
    connect_upload(panel.join, join, [panel.join, panel.name, *panel.concept()], panel.outputs())
    panel.example.click(add_example, None, panel.outputs(), **QUIET)


def _tell(faults: list[str]) -> None:
    """Show what an upload left out."""
    if faults:
        show_note(f"Left out: {'; '.join(faults)}")


def _connect_editing(studio: Studio, panel: PhotoPanel) -> None:
    picked = gr.State("")  # name of the photo that "Remove" deletes

    @with_messages
    def pick(event: gr.SelectData):
        name = event.value["caption"]
        return name, gr.Button(f"Remove {name}", interactive=True)

    @with_messages
    def remove(
        photo: str, name: str | None, shown: str, trigger: str, noun: str, request: gr.Request
    ):
        from rite_diffusion.studio.photo_sets import remove_photo

        if not name or not photo:
            raise StudioError("choose a photo first: click its picture.")
        space = studio.space(request)
        remove_photo(space.find("photos", name), photo)
        return [*show_set(space, name, shown, trigger, noun), ""]

    @with_messages
    def save_captions(name: str | None, rows: list[list[str]], request: gr.Request):
        from rite_diffusion.studio.photo_sets import write_captions

        if name:
            write_captions(studio.space(request).find("photos", name), rows)

    panel.captions.input(save_captions, [panel.name, panel.captions], None, **QUIET)
    panel.thumbnails.select(pick, None, [picked, panel.remove], **QUIET)
    panel.remove.click(
        remove, [picked, panel.name, *panel.concept()], [*panel.outputs(), picked], **QUIET
    )  # fmt: skip


def _lay_out() -> PhotoPanel:
    with gr.Row(elem_classes="end"):
        name = gr.Dropdown([], label="Photo set", scale=3, min_width=160, elem_id="photo-set")
        fresh = gr.Button("New set", scale=0, min_width=100, visible=False, elem_id="new-set")
        undo = gr.Button("Undo", size="sm", visible=False, min_width=150, elem_id="undo-photos")
        example = gr.Button("Try the example", scale=1, min_width=150, elem_id="example")
    drop = gr.File(
        label="New set: drop photos and captions, or a zip",
        file_count="multiple",
        file_types=FILES,
        height=84,
        elem_id="drop-photos",
        elem_classes="drop",
    )
    empty = gr.HTML(NO_PHOTOS)
    thumbnails = gr.Gallery(
        label="Photos", columns=6, height="auto", object_fit="cover", allow_preview=False,
        visible=False, interactive=False, buttons=[], elem_id="thumbnails",
    )  # fmt: skip
    captions = gr.Dataframe(
        headers=["photo", "caption"],
        datatype="str",
        type="array",
        static_columns=[0],
        column_widths=["30%", "70%"],
        wrap=True,
        label="Captions: say what is not the concept; an empty one is filled from templates",
        visible=False,
        max_height=260,
        buttons=[],
        interactive=True,
        elem_id="captions",
    )
    with gr.Row():
        join = gr.UploadButton(
            "Add to this set", file_count="multiple", file_types=FILES, size="sm", min_width=140,
            visible=False, elem_id="join-photos",
        )  # fmt: skip
        remove = gr.Button(
            NOTHING_PICKED, size="sm", visible=False, min_width=180, elem_id="remove-photo"
        )
    actions = gr.Accordion("Rename, empty or delete this set", open=False, visible=False,
                           elem_id="set-actions")  # fmt: skip
    with gr.Row():
        trigger = gr.Textbox(
            value="", label="Trigger", placeholder="<robot>", info="a new word that will call it",
            max_length=64, min_width=140, elem_id="trigger",
        )  # fmt: skip
        class_noun = gr.Textbox(
            value="", label="What it is", placeholder="robot", info="one plain noun",
            max_length=64, min_width=140, elem_id="class-noun",
        )  # fmt: skip
    return PhotoPanel(
        name, drop, example, empty, thumbnails, captions, remove, join, actions, undo, fresh,
        trigger, class_noun, gr.State(""),
    )  # fmt: skip


def show_set(
    space: Workspace, name: str | None, before: str, trigger: str, class_noun: str
) -> list[Any]:
    """Values of `PhotoPanel.outputs` for a set, or for none.

    `before` is the set that was shown, with its trigger and class noun: another set comes with
    those of its own last run, so that two concepts do not mix.
    """
    known = space.names("photos")
    name = name if name in known else None
    photos = _photos(space.find("photos", name)) if name else []
    pictures, bad = [], []
    for photo in photos:
        small = thumbnail(photo.path, photo.path.stat().st_mtime_ns)
        if small is None:
            bad.append(photo.path.name)
        else:
            pictures.append((small, photo.path.name))
    if bad:
        show_note(f"Not readable as pictures: {', '.join(bad)}.")
    rows = [[photo.path.name, photo.caption] for photo in photos]
    deleted, some = space.last_in_trash("photos"), bool(photos)
    return [
        gr.Dropdown(choices=known, value=name),
        gr.HTML(visible=not photos),
        gr.Gallery(value=pictures, visible=some),
        gr.Dataframe(value=rows, visible=some),
        gr.Button(NOTHING_PICKED, visible=some, interactive=False),
        gr.UploadButton(visible=name is not None),
        gr.Accordion(visible=name is not None),
        gr.Button(f"Undo: bring {deleted} back", visible=bool(deleted)),
        gr.Button(visible=name is not None),
        name or "",
        *_concept(space, name, before, trigger, class_noun),
    ]


def _concept(
    space: Workspace, name: str | None, before: str, trigger: str, class_noun: str
) -> tuple[str, str]:
    """Trigger and class noun for the set `name`, shown after `before`."""
    from rite_diffusion.studio.photo_sets import concept_of

    typed_first = not before and (trigger or class_noun)
    if name == (before or None) or typed_first:
        return trigger, class_noun
    return concept_of(space, name) if name else ("", "")


def _photos(folder: Path) -> list["CaptionedPhoto"]:
    from rite_diffusion.studio.photo_sets import read_set

    return read_set(folder)


@lru_cache(maxsize=500)
def thumbnail(path: Path, changed: int) -> Image.Image | None:
    """A small copy of a photo, None where the file is not a picture."""
    from rite_diffusion.photos.images import UnreadableImage, open_image

    try:
        image = open_image(path)
    except UnreadableImage:
        return None
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return image
