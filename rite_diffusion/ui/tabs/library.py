"""Library: every adapter with its facts; bring in, rename, delete and undo, download."""

from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image, ImageDraw, ImageFont

from rite_diffusion.types import RiteError
from rite_diffusion.ui import library
from rite_diffusion.ui.library import Card
from rite_diffusion.ui.page import empty_state, facts_html, in_words, shown, tell, uploaded
from rite_diffusion.ui.studio import Studio
from rite_diffusion.ui.tabs import Refresh

NO_ADAPTERS = empty_state(
    "No adapters yet",
    "Train one in the Train tab, or drop .safetensors files of other tools above.",
)
UNCHOSEN = empty_state("Click an adapter", "Its facts appear here, and what you can do with it.")
PLATE = 256  # pixels of the picture of an adapter that has none
PLATES = ("#5b4ee5", "#0e9f6e", "#c2410c", "#be185d", "#0369a1", "#7c3aed")


def build(studio: Studio) -> list[Refresh]:
    """Lay the tab out and connect it."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=7, min_width=320):
            drop = gr.File(
                label="Drop adapters (.safetensors) to bring them in",
                file_count="multiple", file_types=[".safetensors"], height=110, elem_id="bring-in",
            )  # fmt: skip
            empty = gr.HTML(NO_ADAPTERS, elem_id="no-adapters")
            cards = gr.Gallery(
                label="Adapters, newest first", columns=4, height="auto", object_fit="cover",
                allow_preview=False, interactive=False, buttons=[], visible=False,
                elem_id="cards",
            )  # fmt: skip
        with gr.Column(scale=5, min_width=320):
            facts = gr.HTML(UNCHOSEN, elem_id="card")
            with gr.Group(visible=False) as actions:
                with gr.Row():
                    name = gr.Textbox(label="Name", max_length=64, scale=3, elem_id="card-name")
                    rename = gr.Button("Rename", scale=1, min_width=90)
                with gr.Row():
                    download = gr.DownloadButton("Download", elem_id="download")
                    delete = gr.Button("Delete", variant="stop", elem_id="delete")
            undo = gr.Button("Undo the last delete", size="sm", elem_id="undo")
    names = gr.State([])  # of the cards
    picked = gr.State("")
    shelf = [cards, empty, names]
    detail = [facts, actions, name, download, picked]
    quiet = {"show_progress": "hidden", "api_visibility": "private"}

    def list_all(request: gr.Request) -> list[Any]:
        found = library.cards(studio.space(request))
        pictures = [(_picture(card), _caption(card)) for card in found]
        return [
            gr.Gallery(value=pictures, visible=bool(found)),
            gr.HTML(visible=not found),
            [card.name for card in found],
        ]

    @in_words
    def refresh(request: gr.Request):
        return list_all(request)

    @in_words
    def pick(names: list[str], request: gr.Request, event: gr.SelectData):
        return _detail(library.find(studio.space(request), names[event.index]))

    @in_words
    def bring_in(files: list[str], request: gr.Request):
        space, faults = studio.space(request), []
        for file in files:
            try:
                tell(f"'{library.bring_in(space, uploaded(file))}' is in the library.")
            except RiteError as error:
                faults.append(str(error).replace(str(Path(file)), Path(file).name))
        if faults:
            gr.Warning("<br>".join(escape(fault) for fault in faults), title="Not taken")
        return [*list_all(request), None]

    @in_words
    def rename_it(old: str, new: str, request: gr.Request):
        space = studio.space(request)
        fresh = library.rename(space, old, new)
        return [*list_all(request), *_detail(library.find(space, fresh))]

    @in_words
    def delete_it(old: str, request: gr.Request):
        library.delete(studio.space(request), old)
        tell(f"'{old}' is deleted. Undo puts it back.")
        return [*list_all(request), UNCHOSEN, gr.Group(visible=False), "", None, ""]

    @in_words
    def undo_it(request: gr.Request):
        home = studio.space(request).put_back()
        tell(f"'{home.stem}' is back.")
        return list_all(request)

    cards.select(pick, names, detail, **quiet)
    drop.upload(bring_in, drop, [*shelf, drop], api_visibility="private")
    gr.on([rename.click, name.submit], rename_it, [picked, name], [*shelf, *detail], **quiet)
    delete.click(delete_it, picked, [*shelf, *detail], **quiet)
    undo.click(undo_it, None, shelf, **quiet)
    return [Refresh(refresh, shelf)]


def _caption(card: Card) -> str:
    """What stands below an adapter's picture."""
    return " · ".join(word for word in (card.name, card.trigger) if word)


def _detail(card: Card) -> list[Any]:
    """Values of the side that shows one adapter."""
    facts = [
        ("Trigger", card.trigger or "not stated"),
        ("What it is", card.class_noun),
        ("Base", card.base or "not stated"),
        ("Method", card.method),
        ("Rank", card.ranks),
        ("Size", f"{card.size / 1e6:.2f} MB"),
        ("Made by run", card.run),
    ]
    return [
        facts_html(facts),
        gr.Group(visible=True),
        card.name,
        gr.DownloadButton(value=shown(card.path, f"{card.name}.safetensors")),
        card.name,
    ]


def _picture(card: Card) -> str | Image.Image:
    """An adapter's preview, or a plate with its initial."""
    if card.preview is not None:
        return shown(card.preview)
    plate = Image.new("RGB", (PLATE, PLATE), PLATES[sum(map(ord, card.name)) % len(PLATES)])
    letter, font = card.name[:1].upper(), ImageFont.load_default(PLATE // 2)
    ImageDraw.Draw(plate).text((PLATE / 2, PLATE / 2), letter, "white", font, anchor="mm")
    return plate
