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
from rite_diffusion.studio.workspace import name_from

if TYPE_CHECKING:
    from rite_diffusion.studio.photo_sets import CaptionedPhoto

THUMBNAIL = 224  # pixels of the longer side
NO_PHOTOS = empty_state(
    "Start with five to ten photos of one thing",
    "Vary background and distance. Drop them above, with captions as .txt files of the same names "
    "if you have them, or try the example.",
)

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
    trigger: gr.Textbox
    class_noun: gr.Textbox

    def outputs(self) -> list[Any]:
        """The components that show a set; `_show` has their values."""
        return [self.name, self.empty, self.thumbnails, self.captions, self.remove]


def build_photos(studio: Studio) -> tuple[PhotoPanel, Refresh]:
    """Make the components and connect their events."""
    panel = _lay_out()
    _connect_adding(studio, panel)
    _connect_editing(studio, panel)

    @with_messages
    def choose(name: str | None, request: gr.Request):
        return _show(studio, request, name)

    panel.name.input(choose, panel.name, panel.outputs(), **QUIET)
    return panel, Refresh(choose, panel.outputs(), [panel.name])


def _connect_adding(studio: Studio, panel: PhotoPanel) -> None:
    @with_messages
    def add(files: list[str], name: str | None, request: gr.Request):
        from rite_diffusion.studio.uploads import save_photos

        space = studio.space(request)
        sources = [str(checked_upload(file)) for file in files]
        archive = next((path for path in map(Path, sources) if path.suffix == ".zip"), None)
        folder = (
            space.find("photos", name)
            if name
            else space.new("photos", name_from(archive.stem if archive else "", "photos"))
        )
        save_photos(sources, folder)
        return _show(studio, request, folder.name)

    @with_messages
    def add_example(request: gr.Request):
        from rite_diffusion.api.demo import example_photos
        from rite_diffusion.studio.uploads import save_photos

        folder = studio.space(request).new("photos", "robot")
        save_photos([str(path) for path in sorted(example_photos("robot").iterdir())], folder)
        return [*_show(studio, request, folder.name), "<robot>", "robot"]

    connect_upload(panel.drop, add, [panel.drop, panel.name], panel.outputs())
    panel.example.click(
        add_example, None, [*panel.outputs(), panel.trigger, panel.class_noun], **QUIET
    )


def _connect_editing(studio: Studio, panel: PhotoPanel) -> None:
    picked = gr.State("")  # name of the photo that "Remove" deletes

    @with_messages
    def pick(event: gr.SelectData):
        name = event.value["caption"]
        return name, gr.Button(f"Remove {name}", interactive=True)

    @with_messages
    def remove(name: str | None, photo: str, request: gr.Request):
        from rite_diffusion.studio.photo_sets import remove_photo

        if not name or not photo:
            raise StudioError("choose a photo first: click its picture.")
        remove_photo(studio.space(request).find("photos", name), photo)
        return [*_show(studio, request, name), ""]

    @with_messages
    def save_captions(name: str | None, rows: list[list[str]], request: gr.Request):
        from rite_diffusion.studio.photo_sets import write_captions

        if name:
            write_captions(studio.space(request).find("photos", name), rows)

    panel.captions.input(save_captions, [panel.name, panel.captions], None, **QUIET)
    panel.thumbnails.select(pick, None, [picked, panel.remove], **QUIET)
    panel.remove.click(remove, [panel.name, picked], [*panel.outputs(), picked], **QUIET)


def _lay_out() -> PhotoPanel:
    with gr.Row(elem_classes="end"):
        name = gr.Dropdown([], label="Photo set", scale=3, min_width=160, elem_id="photo-set")
        example = gr.Button("Try the example", scale=1, min_width=150, elem_id="example")
    drop = gr.File(
        label="Drop photos and captions, or a zip of them",
        file_count="multiple",
        file_types=["image", ".zip", ".txt", ".caption"],
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
    remove = gr.Button("Remove a photo: click it first", size="sm", visible=False)
    with gr.Row():
        trigger = gr.Textbox(
            value="", label="Trigger", placeholder="<robot>", info="a new word that will call it",
            max_length=64, min_width=140, elem_id="trigger",
        )  # fmt: skip
        class_noun = gr.Textbox(
            value="", label="What it is", placeholder="robot", info="one plain noun",
            max_length=64, min_width=140, elem_id="class-noun",
        )  # fmt: skip
    return PhotoPanel(name, drop, example, empty, thumbnails, captions, remove, trigger, class_noun)


def _show(studio: Studio, request: gr.Request, name: str | None) -> list[Any]:
    """Values of `PhotoPanel.outputs` for a set, or for none."""
    space = studio.space(request)
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
    return [
        gr.Dropdown(choices=known, value=name),
        gr.HTML(visible=not photos),
        gr.Gallery(value=pictures, visible=bool(photos)),
        gr.Dataframe(value=rows, visible=bool(photos)),
        gr.Button("Remove a photo: click it first", visible=bool(photos), interactive=False),
    ]


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
