"""Convert: an adapter in another tool's dialect, proven by loading it back, to download."""

import shutil
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import gradio as gr

from rite_diffusion.ui import library
from rite_diffusion.ui.page import empty_state, facts_html, in_words, shown
from rite_diffusion.ui.studio import DEVICE, Studio
from rite_diffusion.ui.tabs import Refresh

if TYPE_CHECKING:
    from rite_diffusion.conversion import Export

NOTHING = empty_state(
    "An adapter for another program",
    "Choose one and the program's dialect. The export is loaded back and compared first.",
)


def build(studio: Studio) -> list[Refresh]:
    """Lay the tab out and connect it."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=5, min_width=320):
            name = gr.Dropdown([], label="Adapter", elem_id="convert-name")
            to = gr.Dropdown([], label="For", elem_id="convert-to")
            go = gr.Button("Convert", variant="primary", elem_id="convert")
        with gr.Column(scale=7, min_width=320):
            report = gr.HTML(NOTHING, elem_id="convert-report")
            download = gr.DownloadButton("Download", visible=False, elem_id="convert-download")

    @in_words
    def convert(name: str, to: str, request: gr.Request):
        from rite_diffusion.conversion import convert as converted

        card = library.find(studio.space(request), name)
        with TemporaryDirectory() as folder:
            suffix = "" if to == "peft" else library.SUFFIX
            export = converted(card.path, to, Path(folder) / f"{card.name}-{to}{suffix}")
            file = shown(_one_file(export, Path(folder)))
        return _report(export), gr.DownloadButton(value=file, visible=True)

    @in_words
    def refresh(name: str | None, request: gr.Request):
        from rite_diffusion.adapters.dialects import DIALECTS

        known = [card.name for card in library.cards(studio.space(request))]
        chosen = name if name in known else next(iter(known), None)
        return gr.Dropdown(choices=known, value=chosen), gr.Dropdown(choices=list(DIALECTS))

    go.click(
        convert, [name, to], [report, download], api_visibility="private",
        concurrency_id=DEVICE, concurrency_limit=1,
    )  # fmt: skip
    return [Refresh(refresh, [name, to], [name])]


def _one_file(export: "Export", folder: Path) -> Path:
    """The export as one file: itself, or a zip of its folder or of it and its embeddings."""
    if export.path.is_file() and not export.embeddings:
        return export.path
    inside = folder / "export"
    inside.mkdir()
    for path in (export.path, *export.embeddings):
        shutil.move(path, inside / path.name)
    return Path(shutil.make_archive(str(folder / export.path.stem), "zip", inside))


def _report(export: "Export") -> str:
    """What was read and what the checks showed."""
    facts = [("Read", f"{len(export.adapter.pairs)} modules in {export.adapter.dialect}'s names")]
    facts += [("Note", note) for note in export.adapter.notes]
    facts += [
        ("Averaged", f"the layers of {word}: no other tool keeps them") for word in export.lossy
    ]
    facts += [
        ("Verified", f"{check.modules} modules, difference {check.difference:.1e}, {check.reader}")
        for check in export.checks
    ]
    if export.pixels is not None:
        facts.append(("Pictures", f"largest difference {export.pixels} of 255"))
    return facts_html(facts) + f"<p>{escape(export.path.name)}</p>"
