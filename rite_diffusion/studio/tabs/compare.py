"""Compare: one sheet of pictures over prompts, adapters, weights, methods and seeds."""

from dataclasses import dataclass
from typing import Any

import gradio as gr

from rite_diffusion.errors import StudioError
from rite_diffusion.studio import library
from rite_diffusion.studio.background import run_with_progress
from rite_diffusion.studio.page import empty_state, link_to, show_note, with_messages
from rite_diffusion.studio.sheet_requests import SheetRequest, draw_sheet
from rite_diffusion.studio.state import DEVICE, Studio
from rite_diffusion.studio.tabs import BuiltTab, Refresh
from rite_diffusion.studio.tabs.adapters import offered
from rite_diffusion.studio.tabs.drawing import waiting_html
from rite_diffusion.studio.tabs.fields import optional_number, whole_number
from rite_diffusion.studio.tabs.fuse import METHODS

AXES = [
    ("prompts", "prompt"), ("adapters", "adapter"), ("weights", "weight"), ("methods", "method"),
    ("seeds", "seed"),
]  # fmt: skip
NO_SHEET = empty_state(
    "One sheet, everything side by side",
    "Write prompts, one a line; choose adapters, weights and seeds. Every combination is drawn.",
)
BASE_ALONE = "the base alone"
ATTACHED = "attached"
UNFUSED = (ATTACHED, "switch", "composite")  # methods that do not fuse
APART, TOGETHER = "each on its own", "all together"


@dataclass(frozen=True)
class SheetForm:
    """The components of the tab."""

    prompts: gr.Textbox
    names: gr.Dropdown
    how: gr.Radio
    weights: gr.Textbox
    seeds: gr.Textbox
    methods: gr.Dropdown
    columns: gr.Dropdown
    steps: gr.Textbox
    go: gr.Button
    stop: gr.Button
    stage: gr.HTML
    sheet: gr.Image

    def fields(self) -> list[Any]:
        """The inputs of a sheet's request."""
        return [
            self.prompts, self.names, self.how, self.weights, self.seeds, self.methods,
            self.columns, self.steps,
        ]  # fmt: skip


def _lay_out() -> SheetForm:
    with gr.Row(equal_height=False):
        with gr.Column(scale=5, min_width=320):
            prompts = gr.Textbox(
                value="", label="Prompts, one a line", lines=3, elem_id="sheet-prompts",
                placeholder="a <robot> on a blue background\na <robot> on a green background",
            )  # fmt: skip
            names = gr.Dropdown(
                [BASE_ALONE], value=[BASE_ALONE], multiselect=True, label="Adapters",
                elem_id="sheet-adapters",
            )  # fmt: skip
            how = gr.Radio([APART, TOGETHER], value=APART, show_label=False, container=False)
            with gr.Row():
                weights = gr.Textbox("1", label="Weights", placeholder="0.5, 1", min_width=110,
                                     elem_id="sheet-weights")  # fmt: skip
                seeds = gr.Textbox("0, 1, 2", label="Seeds", min_width=110, elem_id="sheet-seeds")
            methods = gr.Dropdown(
                [*UNFUSED, *METHODS], value=[ATTACHED], multiselect=True,
                label="How adapters are combined",
                info="attached, switch and composite leave the adapters apart; the others fuse",
            )  # fmt: skip
            with gr.Row():
                columns = gr.Dropdown(AXES, value="seed", label="Columns are", min_width=110)
                steps = optional_number("Steps", "sheet-steps")
            with gr.Row():
                go = gr.Button("Draw the sheet", variant="primary", scale=2, elem_id="compare")
                stop = gr.Button("Stop", scale=0, min_width=80)
        with gr.Column(scale=7, min_width=320):
            stage = gr.HTML(NO_SHEET, elem_id="sheet-stage")
            sheet = gr.Image(
                label="Sheet", type="filepath", visible=False, interactive=False,
                buttons=["download", "fullscreen"], elem_id="sheet",
            )  # fmt: skip
    return SheetForm(
        prompts, names, how, weights, seeds, methods, columns, steps, go, stop, stage, sheet
    )


def build(studio: Studio) -> BuiltTab:
    """Make the tab and connect its events."""
    form = _lay_out()

    @with_messages
    def draw(
        request: gr.Request, prompts: str, names: list[str], how: str, weights: str, seeds: str,
        methods: list[str], columns: str, steps: str,
    ):  # fmt: skip
        space = studio.space(request)
        wanted = SheetRequest(
            [line.strip() for line in prompts.splitlines() if line.strip()],
            groups_of(names, how),
            numbers_in(weights, "weights", float),
            methods or [ATTACHED],
            numbers_in(seeds, "seeds", int),
            columns,
            whole_number(steps, "steps"),
        )
        yield {form.stage: waiting_html("Opening the model…"), form.sheet: gr.Image(visible=False)}
        notes = list[str]()
        work = run_with_progress(
            lambda progress: draw_sheet(studio, space, wanted, progress, notes.append)
        )
        for kind, what in work:
            if kind == "progress":
                done, total = what
                yield {form.stage: waiting_html(f"{done} of {total} pictures", done / total)}
            else:
                yield {form.stage: "", form.sheet: gr.Image(value=link_to(what), visible=True)}
        for line in notes:
            show_note(line)

    @with_messages
    def refresh(chosen: list[str], request: gr.Request):
        known = [BASE_ALONE, *(card.name for card in library.cards(studio.space(request)))]
        return offered(known, chosen)

    event = form.go.click(
        draw, form.fields(), [form.stage, form.sheet],
        show_progress="hidden", concurrency_id=DEVICE, concurrency_limit=1,
        trigger_mode="once", api_visibility="private",
    )  # fmt: skip
    event.failure(
        lambda: NO_SHEET, None, form.stage, show_progress="hidden", api_visibility="private"
    )
    form.stop.click(
        lambda: NO_SHEET, None, form.stage, cancels=[event], queue=False, api_visibility="private"
    )
    return BuiltTab([Refresh(refresh, [form.names], [form.names])])


def groups_of(names: list[str], how: str) -> list[list[str]]:
    """The lists of adapters that a sheet compares; [] is the base alone."""
    own = [name for name in names if name != BASE_ALONE]
    alone: list[list[str]] = [[]] if BASE_ALONE in names or not own else []
    if how == TOGETHER:
        return [*alone, own] if own else alone
    return [*alone, *([name] for name in own)]


def numbers_in(text: str, what: str, kind: type) -> list:
    """The numbers of a comma-separated text; StudioError for anything else."""
    try:
        return [kind(part) for part in text.replace(";", ",").split(",") if part.strip()]
    except ValueError:
        raise StudioError(f"{what} are numbers with commas between them, not '{text}'.") from None
