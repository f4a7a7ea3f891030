"""Compare: one sheet of pictures over prompts, adapters, weights, methods and seeds."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from rite_diffusion.types import StudioError
from rite_diffusion.ui import library
from rite_diffusion.ui.background import followed
from rite_diffusion.ui.page import empty_state, in_words, progress_bar, shown
from rite_diffusion.ui.studio import DEVICE, Studio
from rite_diffusion.ui.tabs import Refresh
from rite_diffusion.ui.workspace import Workspace

MOST_PICTURES = 256
AXES = [
    ("Prompts", "prompt"), ("Adapters", "adapter"), ("Weights", "weight"), ("Methods", "method"),
    ("Seeds", "seed"),
]  # fmt: skip
NO_SHEET = empty_state(
    "One sheet, everything side by side",
    "Write prompts, one a line; choose adapters, weights and seeds. Every combination is drawn.",
)
BASE_ALONE = "the base alone"


def build(studio: Studio) -> list[Refresh]:
    """Lay the tab out and connect it."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=5, min_width=320):
            prompts = gr.Textbox(
                label="Prompts, one a line", lines=3, elem_id="sheet-prompts",
                placeholder="a <robot> on a blue background\na <robot> on a green background",
            )  # fmt: skip
            names = gr.Dropdown([BASE_ALONE], value=[BASE_ALONE], multiselect=True,
                                label="Adapters, each on its own")  # fmt: skip
            joined = gr.Checkbox(False, label="All of them together instead")
            with gr.Row():
                weights = gr.Textbox("1", label="Weights", placeholder="0.5, 1", min_width=110)
                seeds = gr.Textbox("0, 1, 2", label="Seeds", min_width=110)
            with gr.Row():
                methods = gr.Dropdown(
                    ["attached"], value=["attached"], multiselect=True, min_width=140,
                    label="Ways to put several together",
                )  # fmt: skip
                columns = gr.Dropdown(AXES, value="seed", label="Columns", min_width=110)
            steps = gr.Slider(1, 100, value=25, step=1, label="Steps")
            with gr.Row():
                go = gr.Button("Draw the sheet", variant="primary", scale=2, elem_id="compare")
                stop = gr.Button("Stop", scale=1, min_width=80)
        with gr.Column(scale=7, min_width=320):
            stage = gr.HTML(NO_SHEET, elem_id="sheet-stage")
            sheet = gr.Image(
                label="Sheet", type="filepath", visible=False, interactive=False,
                buttons=["download", "fullscreen"], elem_id="sheet",
            )  # fmt: skip

    @in_words
    def draw(request: gr.Request, *values: Any):
        space = studio.space(request)
        axes = _axes(space, *values[:6])
        yield {stage: _waiting(0, 1)}
        base = library.base_of(space, [name for name in values[1] if name != BASE_ALONE])
        for kind, what in _drawing(space, axes, values[6], int(values[7]), base):
            if kind == "heard":
                yield {stage: _waiting(*what)}
            else:
                path = Path(what.info["path"])
                yield {stage: "", sheet: gr.Image(value=shown(path), visible=True)}

    @in_words
    def refresh(chosen: list[str], request: gr.Request):
        from rite_diffusion.sheets import METHODS

        known = [BASE_ALONE, *(card.name for card in library.cards(studio.space(request)))]
        kept = [name for name in chosen if name in known]
        return gr.Dropdown(choices=known, value=kept), gr.Dropdown(choices=list(METHODS))

    event = go.click(
        draw, [prompts, names, joined, weights, seeds, methods, columns, steps], [stage, sheet],
        show_progress="hidden", concurrency_id=DEVICE, concurrency_limit=1,
        trigger_mode="once", api_visibility="private",
    )  # fmt: skip
    stop.click(lambda: NO_SHEET, None, stage, cancels=[event], api_visibility="private")
    return [Refresh(refresh, [names, methods], [names])]


def _axes(
    space: Workspace,
    prompts: str,
    names: list[str],
    joined: bool,
    weights: str,
    seeds: str,
    methods: list[str],
) -> dict[str, list]:
    """The axes' values as `sheets.grid` takes them; StudioError says what is missing."""
    texts = [line.strip() for line in prompts.splitlines() if line.strip()]
    chosen = [(name, 1.0) for name in names if name != BASE_ALONE]
    files = library.with_weights(space, chosen)
    if joined and files:
        files = ["+".join(files)]
    adapters = [""] * (BASE_ALONE in names) + files
    axes = {
        "prompts": texts,
        "adapters": adapters or [""],
        "weights": _numbers(weights, "weights", float),
        "methods": methods or ["attached"],
        "seeds": _numbers(seeds, "seeds", int),
    }
    if not texts:
        raise StudioError("write a prompt first: what should the pictures show?")
    count = 1
    for values in axes.values():
        count *= len(values)
    if count > MOST_PICTURES:
        raise StudioError(f"that makes {count} pictures: {MOST_PICTURES} at most.")
    return axes


def _numbers(text: str, what: str, kind: type) -> list:
    try:
        return [kind(part) for part in text.replace(";", ",").split(",") if part.strip()]
    except ValueError:
        raise StudioError(f"{what} are numbers with commas between them, not '{text}'.") from None


def _drawing(
    space: Workspace, axes: dict[str, Any], columns: str, steps: int, base: str | None
) -> Iterator[tuple[str, Any]]:
    """The reports of a sheet that is being drawn, then the sheet."""
    from rite_diffusion.sheets import grid

    number = len(list(space.folder("sheets").glob("*.png")))
    out = space.new("sheets", f"{number:05d}", ".png")
    return followed(
        lambda listen: grid(**axes, columns=columns, steps=steps, base=base, out=out, listen=listen)
    )


def _waiting(done: int, total: int) -> str:
    return f'<div class="stage">{progress_bar(done / total)}<p>{done} of {total} pictures</p></div>'
