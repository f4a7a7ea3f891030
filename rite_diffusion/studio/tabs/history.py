"""The history of pictures: their parameters, shown and restored into the fields."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from rite_diffusion.studio import library
from rite_diffusion.studio.boxes import boxes_of
from rite_diffusion.studio.page import (
    checked_upload,
    connect_upload,
    facts_html,
    links_to,
    show_note,
    with_messages,
)
from rite_diffusion.studio.state import Studio
from rite_diffusion.studio.tabs.adapters import MAX_ADAPTERS, Chooser, sliders
from rite_diffusion.studio.tabs.drawing import DrawingPanel
from rite_diffusion.studio.tabs.fields import Fields
from rite_diffusion.studio.tabs.regions import RegionPanel, panel_values
from rite_diffusion.studio.workspace import Workspace


@dataclass(frozen=True)
class RestorePanel:
    """Components where pictures are clicked or dropped, and the fields that are restored."""

    settings: Fields
    chooser: Chooser
    regions: RegionPanel
    drop: gr.File
    again: gr.Button
    accordion: gr.Accordion
    history: gr.Gallery
    panel: DrawingPanel

    def filled(self) -> list[Any]:
        """The components that `_restored` has values for."""
        chooser = self.chooser
        own = [*self.settings.all(), chooser.chosen, chooser.weighted, *chooser.inputs()]
        return [*own, *self.regions.outputs()]


def connect_restore(studio: Studio, recall: RestorePanel) -> None:
    """Connect clicks on pictures, which show parameters, and drops, which restore them."""
    picked = gr.State("")  # the picture whose facts are shown
    listed = gr.State([])  # names of the pictures in the history
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}

    @with_messages
    def look(names: list[str], request: gr.Request, event: gr.SelectData):
        name, space = names[event.index], studio.space(request)
        return name, _facts(space, space.find("outputs", name)), gr.Button(visible=True)

    @with_messages
    def load(request: gr.Request):
        from rite_diffusion.studio.history import newest

        pictures = newest(studio.space(request))
        return links_to(pictures), [path.name for path in pictures]

    @with_messages
    def restore_picked(name: str, request: gr.Request):
        space = studio.space(request)
        return _restored(space, space.find("outputs", name))

    @with_messages
    def restore_dropped(path: str, request: gr.Request):
        return _restored(studio.space(request), checked_upload(path))

    panel, outputs = recall.panel, [picked, recall.panel.facts, recall.again]
    recall.accordion.expand(load, None, [recall.history, listed], **quiet)
    panel.made.select(look, panel.names, outputs, **quiet)
    recall.history.select(look, listed, outputs, **quiet)
    recall.again.click(restore_picked, picked, recall.filled(), **quiet)
    connect_upload(recall.drop, restore_dropped, [recall.drop], recall.filled())


def _facts(space: Workspace, picture: Path) -> str:
    from rite_diffusion.studio.history import restore

    found = restore(space, picture)
    facts = found.parameters
    used = ", ".join(f"{each.name or each.file} at {each.weight:g}" for each in found.adapters)
    size = f"{facts.width} x {facts.height}"
    how = f"seed {facts.seed}, {facts.steps} steps, guidance {facts.guidance:g}, {size}"
    rows = [("Prompt", facts.prompt), ("Negative", facts.negative), ("Made with", how)]
    rows += [(f"Box {number}", text) for number, text in enumerate(facts.regions, 1)]
    return facts_html([*rows, ("Adapters", used), ("Base", facts.base), ("File", picture.name)])


def _base_field(space: Workspace, base: str) -> str:
    """The text of the base model's field for a picture's base."""
    if base == "pocket":
        return ""
    return Path(base).name if Path(base).name in space.names("models") else base


def _restored(space: Workspace, picture: Path) -> list[Any]:
    """Values of `RestorePanel.filled`."""
    from rite_diffusion.studio.history import restore

    found = restore(space, picture)
    facts = found.parameters
    if found.missing():
        show_note(f"Not in the library any more: {', '.join(found.missing())}.")
    present = [each for each in found.adapters if each.name][:MAX_ADAPTERS]
    names, weights = [each.name for each in present], [each.weight for each in present]
    values = {
        "prompt": facts.prompt,
        "negative": facts.negative,
        "seed": facts.seed,
        "fresh": False,
        "count": 1,
        "steps": str(facts.steps),
        "guidance": str(facts.guidance),
        "width": str(facts.width),
        "height": str(facts.height),
        "base": _base_field(space, facts.base),
    }
    known = [card.name for card in library.cards(space)]
    weighted, *fresh = sliders(names, names, *weights)
    chosen = [names, weighted, gr.Dropdown(choices=known, value=names), *fresh]
    boxes = boxes_of(facts.regions, [each.name for each in found.adapters])
    return [*values.values(), *chosen, *panel_values(names, boxes, 0)]
