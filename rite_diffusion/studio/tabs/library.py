"""Library: every adapter with its facts; import, rename, delete and undo, convert, download."""

from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image, ImageDraw, ImageFont

from rite_diffusion.errors import RiteError
from rite_diffusion.studio import library
from rite_diffusion.studio.exports import PROGRAMS, export
from rite_diffusion.studio.library import Card
from rite_diffusion.studio.page import (
    checked_upload,
    connect_upload,
    empty_state,
    facts_html,
    link_to,
    show_note,
    with_messages,
)
from rite_diffusion.studio.state import DEVICE, Studio
from rite_diffusion.studio.tabs import BuiltTab, Refresh, UseButton
from rite_diffusion.studio.workspace import Workspace, title_of

NO_ADAPTERS = empty_state(
    "No adapters yet",
    "Train one in the Train tab, or drop .safetensors files of other tools above.",
)
UNCHOSEN = empty_state("Click an adapter", "Its facts appear here, and what you can do with it.")
SIDE = 256  # pixels of the picture of an adapter that has none
COLOURS = ("#5b4ee5", "#0e9f6e", "#c2410c", "#be185d", "#0369a1", "#7c3aed")


@dataclass(frozen=True)
class CardPanel:
    """The components that show all adapters as cards."""

    drop: gr.File
    cards: gr.Gallery
    empty: gr.HTML
    undo: gr.Button
    names: gr.State  # of the cards

    def outputs(self) -> list[Any]:
        """The components that `_card_values` has values for."""
        return [self.cards, self.empty, self.undo, self.names]


@dataclass(frozen=True)
class DetailPanel:
    """The components that show one adapter, and the buttons that act on it."""

    facts: gr.HTML
    actions: gr.Group
    name: gr.Textbox
    rename: gr.Button
    use: gr.Button
    download: gr.DownloadButton
    delete: gr.Button
    to: gr.Dropdown
    loss: gr.Checkbox
    convert: gr.Button
    converted: gr.DownloadButton
    proof: gr.HTML
    picked: gr.State

    def outputs(self) -> list[Any]:
        """The components that `_detail_values` has values for."""
        return [
            self.facts, self.actions, self.name, self.download, self.converted, self.proof,
            self.picked,
        ]  # fmt: skip


def build(studio: Studio) -> BuiltTab:
    """Make the tab and connect its events."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=7, min_width=320):
            panel = _lay_out_cards()
        with gr.Column(scale=5, min_width=320):
            detail = _lay_out_detail()
    _connect(studio, panel, detail)
    _connect_export(studio, detail)

    @with_messages
    def refresh(request: gr.Request):
        return _card_values(studio.space(request))

    use = UseButton(detail.use, detail.picked, library.find)
    return BuiltTab([Refresh(refresh, panel.outputs())], use)


def _lay_out_cards() -> CardPanel:
    drop = gr.File(
        label="Drop adapters (.safetensors) to bring them in",
        file_count="multiple", file_types=[".safetensors"], height=84, elem_id="bring-in",
        elem_classes="drop",
    )  # fmt: skip
    empty = gr.HTML(NO_ADAPTERS, elem_id="no-adapters")
    cards = gr.Gallery(
        label="Adapters, newest first", columns=4, height="auto", object_fit="cover",
        allow_preview=False, interactive=False, buttons=[], visible=False, fit_columns=False,
        elem_id="cards",
    )  # fmt: skip
    undo = gr.Button("Undo", size="sm", visible=False, elem_id="undo")
    return CardPanel(drop, cards, empty, undo, gr.State([]))


def _lay_out_detail() -> DetailPanel:
    facts = gr.HTML(UNCHOSEN, elem_id="card")
    with gr.Group(visible=False) as actions:
        with gr.Row():
            use = gr.Button("Draw with it", variant="primary", min_width=110, elem_id="use")
            download = gr.DownloadButton("Download", min_width=110, elem_id="download")
            delete = gr.Button("Delete", variant="stop", min_width=90, elem_id="delete")
        with gr.Row(elem_classes="end"):
            name = gr.Textbox("", label="Name", max_length=64, scale=3, elem_id="card-name")
            rename = gr.Button("Rename", scale=1, min_width=90, elem_id="rename")
        with gr.Accordion("For another program", open=False, elem_id="convert-fold"):
            to = gr.Dropdown(
                [(words, dialect) for dialect, words in PROGRAMS.items()],
                value="kohya", label="Program", elem_id="convert-to",
            )  # fmt: skip
            loss = gr.Checkbox(
                False, label="Allow loss", elem_id="convert-loss",
                info="even where more than 1 % of the adapter cannot be kept",
            )  # fmt: skip
            convert = gr.Button("Convert", elem_id="convert")
            proof = gr.HTML("", padding=True, elem_id="proof")
            converted = gr.DownloadButton(
                "Download the converted file", visible=False, elem_id="converted"
            )
    return DetailPanel(
        facts, actions, name, rename, use, download, delete, to, loss, convert, converted,
        proof,
        gr.State(""),
    )  # fmt: skip


def _connect(studio: Studio, panel: CardPanel, detail: DetailPanel) -> None:
    @with_messages
    def pick(names: list[str], request: gr.Request, event: gr.SelectData):
        return _detail_values(library.find(studio.space(request), names[event.index]))

    @with_messages
    def import_files(files: list[str], request: gr.Request):
        space = studio.space(request)
        _import_files(space, files)
        return _card_values(space)

    @with_messages
    def rename_it(old: str, new: str, request: gr.Request):
        space = studio.space(request)
        fresh = library.rename(space, old, new)
        return [*_card_values(space), *_detail_values(library.find(space, fresh))]

    @with_messages
    def delete_it(old: str, request: gr.Request):
        space = studio.space(request)
        library.delete(space, old)
        show_note(f"'{old}' is deleted. Undo puts it back.")
        return [*_card_values(space), *_no_detail()]

    @with_messages
    def undo_it(request: gr.Request):
        space = studio.space(request)
        show_note(f"'{title_of(space.restore_from_trash())}' is back.")
        return _card_values(space)

    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    both = [*panel.outputs(), *detail.outputs()]
    panel.cards.select(pick, panel.names, detail.outputs(), **quiet)
    connect_upload(panel.drop, import_files, [panel.drop], panel.outputs())
    gr.on(
        [detail.rename.click, detail.name.submit], rename_it, [detail.picked, detail.name], both,
        **quiet,
    )  # fmt: skip
    detail.delete.click(delete_it, detail.picked, both, **quiet)
    panel.undo.click(undo_it, None, panel.outputs(), **quiet)


def _connect_export(studio: Studio, detail: DetailPanel) -> None:
    @with_messages
    def convert(name: str, to: str, allow_loss: bool, request: gr.Request):
        link, proof = export(studio, studio.space(request), name, to, None, allow_loss)
        return proof, gr.DownloadButton(value=link, visible=True)

    detail.convert.click(
        convert, [detail.picked, detail.to, detail.loss], [detail.proof, detail.converted],
        api_visibility="private", concurrency_id=DEVICE, concurrency_limit=1,
    )  # fmt: skip


def _import_files(space: Workspace, files: list[str]) -> None:
    """Import the files that are adapters; show why others are refused."""
    faults = []
    for file in files:
        try:
            show_note(f"'{library.import_adapter(space, checked_upload(file))}' is in the library.")
        except RiteError as error:
            faults.append(str(error).replace(str(Path(file)), Path(file).name))
    if faults:
        gr.Warning("<br>".join(escape(fault) for fault in faults), title="Not taken")


def _card_values(space: Workspace) -> list[Any]:
    """Values of `CardPanel.outputs`."""
    found, deleted = library.cards(space), space.last_in_trash()
    pictures = [(_picture(card), _caption(card)) for card in found]
    return [
        gr.Gallery(value=pictures, visible=bool(found)),
        gr.HTML(visible=not found),
        gr.Button(f"Undo the deletion of {deleted}", visible=bool(deleted)),
        [card.name for card in found],
    ]


def _caption(card: Card) -> str:
    """The text below an adapter's picture: its name and trigger."""
    return " · ".join(word for word in (card.name, card.trigger) if word)


def _detail_values(card: Card) -> list[Any]:
    """Values of `DetailPanel.outputs`."""
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
        f"<h3>{escape(card.name)}</h3>{facts_html(facts)}",
        gr.Group(visible=True),
        card.name,
        gr.DownloadButton(value=link_to(card.path, f"{card.name}.safetensors")),
        gr.DownloadButton(visible=False),
        "",
        card.name,
    ]


def _no_detail() -> list[Any]:
    """Values of `DetailPanel.outputs` while no adapter is picked."""
    hidden = gr.DownloadButton(visible=False)
    return [UNCHOSEN, gr.Group(visible=False), "", gr.DownloadButton(), hidden, "", ""]


def _picture(card: Card) -> str | Image.Image:
    """An adapter's preview, or a coloured square with its initial."""
    if card.preview is not None:
        return link_to(card.preview)
    placeholder = Image.new(
        "RGB",
        (SIDE, SIDE),
        COLOURS[sum(map(ord, card.name)) % len(COLOURS)],
    )
    letter, font = card.name[:1].upper(), ImageFont.load_default(SIDE // 2)
    ImageDraw.Draw(placeholder).text((SIDE / 2, SIDE / 2), letter, "white", font, anchor="mm")
    return placeholder
