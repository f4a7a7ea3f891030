"""The studio's API for programs: typed endpoints whose names stay the same.

from gradio_client import Client

studio = Client("http://127.0.0.1:7860")
files = studio.predict(prompt="a cat on a blue background", seed=1, api_name="/generate")
"""

import shutil
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import gradio as gr

from rite_diffusion.errors import RiteError, StudioError
from rite_diffusion.studio import fusing, library, photo_endpoints
from rite_diffusion.studio.checks import check_pictures, check_training
from rite_diffusion.studio.endpoints import endpoint, file_data, linked, path_in
from rite_diffusion.studio.exports import export
from rite_diffusion.studio.page import show_note
from rite_diffusion.studio.presets import STANDARD, training_settings
from rite_diffusion.studio.sheet_requests import SheetRequest, draw_sheet
from rite_diffusion.studio.state import DEVICE, Studio
from rite_diffusion.studio.workspace import name_from, title_of

MAX_PICTURES = 64  # of one request


def build(studio: Studio) -> None:
    """Add the endpoints to the page under construction."""
    _build_generation(studio)
    _build_training(studio)
    _build_library(studio)
    _build_fusion(studio)
    photo_endpoints.build(studio)


def _build_generation(studio: Studio) -> None:
    @endpoint
    def read_picture(file: gr.FileData) -> dict:
        """The parameters that a picture of this studio carries."""
        from rite_diffusion.studio.history import parameters_of

        return asdict(parameters_of(path_in(file)))

    for each in (_generation(studio), _comparison(studio)):
        gr.api(each, concurrency_id=DEVICE, concurrency_limit=1)
    gr.api(read_picture, concurrency_limit=None)


def _generation(studio: Studio) -> Callable:
    @endpoint
    def generate(
        prompt: str,
        adapters: list[str] | None = None,
        negative: str = "",
        seed: int = 0,
        num: int = 1,
        steps: int | None = None,
        guidance: float | None = None,
        width: int | None = None,
        height: int | None = None,
        base: str = "",
        regions: list[str] | None = None,
        region_by: str | None = None,
        combine: str = "sum",
        request: gr.Request = None,  # type: ignore
    ) -> list[gr.FileData]:
        """Draw pictures of a prompt; adapters are NAME or NAME:WEIGHT; returns PNG files.

        Regions are "x0,y0,x1,y1: prompt" in fractions, region_by is attention or predictions;
        combine is sum, switch or composite.
        """
        from rite_diffusion.generation.request import PictureRequest

        if not 1 <= num <= MAX_PICTURES:
            raise StudioError(f"num = {num} is not between 1 and {MAX_PICTURES}")
        space = studio.space(request)
        chosen = [_weighted(item) for item in adapters or []]
        wanted = PictureRequest(
            prompt=prompt, negative=negative, seed=seed, steps=steps, guidance=guidance,
            width=width, height=height, regions=regions or [], region_by=region_by,
            combine=combine,
        )  # fmt: skip
        files = library.with_weights(space, chosen)
        check_pictures(wanted, num, files)
        frames = studio.engine.draw(space, wanted.series(num), show_note, files, base)
        return [file_data(frame.path) for frame in frames if frame.path is not None]

    return generate


def _comparison(studio: Studio) -> Callable:
    @endpoint
    def compare(
        prompts: list[str],
        adapters: list[list[str]] | None = None,
        weights: list[float] | None = None,
        methods: list[str] | None = None,
        seeds: list[int] | None = None,
        columns: str = "seed",
        steps: int | None = None,
        request: gr.Request = None,  # type: ignore
    ) -> gr.FileData:
        """Draw a sheet of every combination; returns a PNG file.

        Each of adapters is a list of names that act together, [] for the base alone; methods say
        how: attached, or one of `rite fuse`. Columns are prompt, adapter, weight, method or seed.
        """
        wanted = SheetRequest(
            prompts, adapters or [[]], weights or [1.0], methods or ["attached"], seeds or [0],
            columns, steps,
        )  # fmt: skip
        return file_data(
            draw_sheet(studio, studio.space(request), wanted, _ignore_progress, show_note)
        )

    return compare


def _ignore_progress(*_: Any) -> None:
    """A progress callback that does nothing."""


def _weighted(item: str) -> tuple[str, float]:
    """Name and weight of `NAME` or `NAME:WEIGHT`."""
    name, colon, weight = item.rpartition(":")
    if not colon:
        return item, 1.0
    try:
        return name, float(weight)
    except ValueError:
        raise StudioError(f"'{weight}' is not a weight: write {name}:0.8, for example.") from None


def _training(studio: Studio) -> Callable:
    @endpoint
    def train(
        photos: list[gr.FileData],
        trigger: str,
        class_noun: str,
        purpose: str = STANDARD,
        settings: str = "",
        base: str = "pocket",
        name: str = "",
        photo_set: str = "",
        request: gr.Request = None,  # type: ignore
    ) -> str:
        """Queue a training on photos or zips; settings are key=value lines; returns the run.

        The photos make a new set; with none, `photo_set` names one that is there.
        """
        from rite_diffusion.studio.uploads import save_photos

        space = studio.space(request)
        stem = name_from(name or class_noun, "run")
        if bool(photos) == bool(photo_set):
            raise StudioError("give photos, which make a new set, or photo_set: one of the two.")
        folder = space.find("photos", photo_set) if photo_set else space.new("photos", stem)
        needed = {
            "photos": str(folder),
            "trigger": trigger,
            "class_noun": class_noun,
            "base": space.base(base) or "pocket",
        }
        tree = training_settings(purpose, needed, {}, settings)
        faults = save_photos([str(path_in(file)) for file in photos], folder) if photos else []
        try:
            faults += check_training(space, tree)
        except RiteError:
            if photos:
                shutil.rmtree(folder)  # made for this training, which does not begin
            raise
        for fault in faults:
            show_note(f"Not used: {fault}")
        run = space.new("runs", stem)
        studio.queue.submit(run, tree)
        return run.name

    return train


def _build_training(studio: Studio) -> None:
    from rite_diffusion.studio.progress import read_progress

    @endpoint
    def run_state(run: str, request: gr.Request = None) -> dict:  # type: ignore
        """State, step, total, loss and seconds left of a run."""
        found = asdict(read_progress(studio.space(request).find("runs", run)))
        return {key: value for key, value in found.items() if key not in ("metrics", "previews")}

    @endpoint
    def runs(request: gr.Request = None) -> list[str]:  # type: ignore
        """Names of all runs, newest first."""
        return studio.space(request).names("runs")

    @endpoint
    def stop_run(run: str, request: gr.Request = None) -> str:  # type: ignore
        """Ask a run to end after its step; returns the state it was in."""
        return studio.queue.stop(studio.space(request).find("runs", run))

    @endpoint
    def resume_run(run: str, request: gr.Request = None) -> str:  # type: ignore
        """Put a stopped or failed run into the queue again."""
        studio.queue.resume(studio.space(request).find("runs", run))
        return "queued"

    @endpoint
    def ask_run(run: str, what: str, request: gr.Request = None) -> str:  # type: ignore
        """Ask a run to `save` a checkpoint or `sample` previews after the current step."""
        if what not in ("save", "sample"):
            raise StudioError(f"a run can be asked to save or to sample, not to '{what}'")
        studio.queue.ask(studio.space(request).find("runs", run), what)
        return what

    for each in (_training(studio), runs, run_state, stop_run, resume_run, ask_run):
        gr.api(each, concurrency_limit=None)


def _build_library(studio: Studio) -> None:
    @endpoint
    def adapters(request: gr.Request = None) -> list[dict]:  # type: ignore
        """Every adapter: name, trigger, class noun, base, method, ranks, size in bytes, run."""
        wanted = ("name", "trigger", "class_noun", "base", "method", "ranks", "size", "run")
        found = library.cards(studio.space(request))
        return [{key: getattr(card, key) for key in wanted} for card in found]

    @endpoint
    def import_adapter(file: gr.FileData, request: gr.Request = None) -> str:  # type: ignore
        """Check an adapter file and copy it into the library; returns its name there."""
        return library.import_adapter(studio.space(request), path_in(file))

    @endpoint
    def download_adapter(name: str, request: gr.Request = None) -> gr.FileData:  # type: ignore
        """The file of an adapter."""
        card = library.find(studio.space(request), name)
        return file_data(card.path, f"{card.name}.safetensors")

    @endpoint
    def rename_adapter(name: str, to: str, request: gr.Request = None) -> str:  # type: ignore
        """Give an adapter another name."""
        return library.rename(studio.space(request), name, to)

    @endpoint
    def delete_adapter(name: str, request: gr.Request = None) -> str:  # type: ignore
        """Delete an adapter, and the run that made it; `undo_delete` restores it."""
        library.delete(studio.space(request), name)
        return name

    @endpoint
    def undo_delete(request: gr.Request = None) -> str:  # type: ignore
        """Restore what was deleted last; returns its name."""
        return title_of(studio.space(request).restore_from_trash())

    @endpoint
    def convert_adapter(
        name: str,
        to: str,
        rank: int | None = None,
        allow_loss: bool = False,
        request: gr.Request = None,  # type: ignore
    ) -> gr.FileData:
        """An adapter in another dialect, checked by loading it: kohya, comfyui, diffusers or peft.

        Modules of a larger rank are cut to it; a loss above 1 % is refused unless allow_loss.
        """
        link, _ = export(studio, studio.space(request), name, to, rank, allow_loss)
        return linked(link)

    for each in (
        adapters, import_adapter, download_adapter, rename_adapter, delete_adapter, undo_delete,
    ):  # fmt: skip
        gr.api(each, concurrency_limit=None)
    gr.api(convert_adapter, concurrency_id=DEVICE, concurrency_limit=1)


def _build_fusion(studio: Studio) -> None:
    @endpoint
    def conflicts(
        adapters: list[str],
        method: str = "gram",
        rank: int | None = None,
        request: gr.Request = None,  # type: ignore
    ) -> dict:
        """The conflict report of adapters (NAME or NAME:WEIGHT), before and after a fusion."""
        space = studio.space(request)
        wanted = fusing.fusion_request(space, [_weighted(item) for item in adapters], method, rank)
        made = fusing.preview_fusion(studio, space, wanted, _ignore_progress)
        return made.report.as_dict() | {"loss": made.loss}

    @endpoint
    def fuse(
        adapters: list[str],
        method: str = "gram",
        rank: int | None = None,
        name: str = "",
        allow_loss: bool = False,
        request: gr.Request = None,  # type: ignore
    ) -> str:
        """Fuse adapters (NAME or NAME:WEIGHT) into one in the library; returns its name there.

        A rank that loses more than 1 % is refused unless allow_loss; `conflicts` returns the loss.
        """
        space = studio.space(request)
        chosen = [_weighted(item) for item in adapters]
        wanted = fusing.fusion_request(space, chosen, method, rank, allow_loss)
        title = library.checked_title(name) if name else wanted.title()
        draft = fusing.new_draft(space)
        fusing.fuse(studio, space, wanted, draft, _ignore_progress)
        return fusing.save_draft(space, draft.name, title, None)

    for each in (conflicts, fuse):
        gr.api(each, concurrency_id=DEVICE, concurrency_limit=1)
