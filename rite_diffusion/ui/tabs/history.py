"""Pictures that were made: their facts, their history, and their settings back in the fields."""

from pathlib import Path
from typing import Any

import gradio as gr

from rite_diffusion.ui import library
from rite_diffusion.ui.page import facts_html, in_words, shown_all, tell, uploaded
from rite_diffusion.ui.studio import Studio
from rite_diffusion.ui.tabs.adapters import MOST, Chooser, sliders
from rite_diffusion.ui.tabs.fields import Fields
from rite_diffusion.ui.workspace import Workspace


def connect_pictures(
    studio: Studio,
    settings: Fields,
    chooser: Chooser,
    drop: gr.File,
    made: gr.Gallery,
    names: gr.State,
    fold: gr.Accordion,
    history: gr.Gallery,
    facts: gr.HTML,
    again: gr.Button,
) -> None:
    """Show the facts of a picture that is clicked; restore those of one that is dropped."""
    picked = gr.State("")  # the picture whose facts are shown
    listed = gr.State([])  # of the pictures in `history`
    quiet = {"show_progress": "hidden", "api_visibility": "private"}

    @in_words
    def look(names: list[str], request: gr.Request, event: gr.SelectData):
        name = names[event.index]
        picture = studio.space(request).find("outputs", name)
        return name, _facts(picture), gr.Button(visible=True)

    @in_words
    def load(request: gr.Request):
        from rite_diffusion.ui.history import newest

        pictures = newest(studio.space(request))
        return shown_all(pictures), [path.name for path in pictures]

    @in_words
    def restore_picked(name: str, request: gr.Request):
        space = studio.space(request)
        return _restored(space, space.find("outputs", name))

    @in_words
    def restore_dropped(path: str, request: gr.Request):
        return [*_restored(studio.space(request), uploaded(path)), None]

    fold.expand(load, None, [history, listed], **quiet)
    made.select(look, names, [picked, facts, again], **quiet)
    history.select(look, listed, [picked, facts, again], **quiet)
    filled = [*settings.all(), chooser.before, *chooser.inputs()]
    again.click(restore_picked, picked, filled, **quiet)
    drop.upload(restore_dropped, drop, [*filled, drop], **quiet)


def _facts(picture: Path) -> str:
    from rite_diffusion.generation.metadata import read_parameters

    facts = read_parameters(picture)
    used = ", ".join(f"{each['file']} at {each['weight']:g}" for each in facts.adapters)
    size = f"{facts.width} x {facts.height}"
    how = f"seed {facts.seed}, {facts.steps} steps, guidance {facts.guidance:g}, {size}"
    rows = [("Prompt", facts.prompt), ("Negative", facts.negative), ("Made with", how)]
    return facts_html([*rows, ("Adapters", used), ("Base", facts.base), ("File", picture.name)])


def _base_field(space: Workspace, base: str) -> str:
    """What the field for the base model says for a picture's base."""
    if base == "pocket":
        return ""
    return Path(base).name if Path(base).name in space.names("models") else base


def _restored(space: Workspace, picture: Path) -> list[Any]:
    """Values of every field, of the adapters' list, and of the sliders."""
    from rite_diffusion.ui.history import restore

    found = restore(space, picture)
    facts = found.parameters
    if found.missing:
        tell(f"Not in the library any more: {', '.join(found.missing)}.")
    names = [name for name, _ in found.adapters][:MOST]
    weights = [weight for _, weight in found.adapters][:MOST]
    values = {
        "prompt": facts.prompt,
        "negative": facts.negative,
        "seed": facts.seed,
        "fresh": False,
        "count": 1,
        "steps": facts.steps,
        "guidance": facts.guidance,
        "width": facts.width,
        "height": facts.height,
        "base": _base_field(space, facts.base),
    }
    known = [card.name for card in library.cards(space)]
    pool = sliders(names, names, *weights)
    return [*values.values(), pool[0], gr.Dropdown(choices=known, value=names), *pool[1:]]
