"""The part of the API that looks after photo sets."""

from collections.abc import Callable

import gradio as gr

from rite_diffusion.studio.endpoints import endpoint, path_in
from rite_diffusion.studio.page import show_note
from rite_diffusion.studio.state import Studio


def build(studio: Studio) -> None:
    """Add the endpoints to the page under construction."""
    for each in (*_contents(studio), *_changes(studio)):
        gr.api(each, concurrency_limit=None)


def _contents(studio: Studio) -> list[Callable]:
    """The endpoints that list sets and add photos."""

    @endpoint
    def photo_sets(request: gr.Request = None) -> list[dict]:  # type: ignore
        """Every photo set, newest first: name, number of photos, trigger and class noun."""
        from rite_diffusion.studio.photo_sets import concept_of, read_set

        space, found = studio.space(request), []
        for name in space.names("photos"):
            trigger, noun = concept_of(space, name)
            count = len(read_set(space.find("photos", name)))
            found.append({"name": name, "photos": count, "trigger": trigger, "class_noun": noun})
        return found

    @endpoint
    def add_photos(
        photos: list[gr.FileData],
        photo_set: str = "",
        request: gr.Request = None,  # type: ignore
    ) -> str:
        """Upload photos, captions or zips into a new set, or into the one named; returns its name.

        Pictures that cannot be read are left out.
        """
        from rite_diffusion.studio.photo_sets import new_set
        from rite_diffusion.studio.uploads import save_photos

        space, files = studio.space(request), [str(path_in(file)) for file in photos]
        if photo_set:
            folder = space.find("photos", photo_set)
            faults = save_photos(files, folder)
        else:
            folder, faults = new_set(space, files, "")
        for fault in faults:
            show_note(f"Left out: {fault}")
        return folder.name

    return [photo_sets, add_photos]


def _changes(studio: Studio) -> list[Callable]:
    """The endpoints that rename, empty and delete sets."""

    @endpoint
    def rename_photo_set(name: str, to: str, request: gr.Request = None) -> str:  # type: ignore
        """Give a photo set another name."""
        from rite_diffusion.studio.photo_sets import rename_set

        return rename_set(studio.space(request), name, to)

    @endpoint
    def clear_photo_set(name: str, request: gr.Request = None) -> str:  # type: ignore
        """Remove all photos of a set; `undo_delete` restores them."""
        from rite_diffusion.studio.photo_sets import clear_set

        clear_set(studio.space(request), name)
        return name

    @endpoint
    def delete_photo_set(name: str, request: gr.Request = None) -> str:  # type: ignore
        """Delete a photo set; `undo_delete` restores it."""
        from rite_diffusion.studio.photo_sets import delete_set

        delete_set(studio.space(request), name)
        return name

    return [rename_photo_set, clear_photo_set, delete_photo_set]
