"""Generate: a prompt, adapters with weights, regions, pictures in progress, and their history."""

from typing import Any

import gradio as gr

from rite_diffusion.studio import library
from rite_diffusion.studio.boxes import region_texts
from rite_diffusion.studio.checks import check_pictures
from rite_diffusion.studio.page import links_to, with_messages
from rite_diffusion.studio.state import DEVICE, Studio
from rite_diffusion.studio.tabs import BuiltTab, Refresh
from rite_diffusion.studio.tabs.adapters import (
    MAX_ADAPTERS,
    Chooser,
    build_chooser,
    chosen_with_weights,
)
from rite_diffusion.studio.tabs.drawing import DrawingPanel, drawing, lay_out_drawing
from rite_diffusion.studio.tabs.fields import Fields, lay_out_fields, named, requests_of
from rite_diffusion.studio.tabs.history import RestorePanel, connect_restore
from rite_diffusion.studio.tabs.regions import (
    RATIO_JS,
    RegionPanel,
    box_adapters,
    build_regions,
    edited,
)

IDLE = (
    "Your pictures appear here",
    "Write a prompt and press Enter. To draw something of your own, train it first in the Train "
    "tab, choose its adapter, and use its trigger word.",
)


def build(studio: Studio) -> tuple[BuiltTab, Chooser]:
    """Make the tab and connect its events; also returns its list of adapters."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=5, min_width=320):
            prompt, chips = _lay_out_prompt()
            with gr.Row():
                go = gr.Button("Generate", variant="primary", scale=3, elem_id="generate")
                stop = gr.Button("Stop", scale=1, min_width=80, elem_id="stop")
            chooser, refresh_adapters = build_chooser(studio)
            regions = build_regions(chooser.names)
            settings = lay_out_fields(prompt)
            drop = gr.File(
                label="Drop a picture to restore its settings",
                file_types=[".png"],
                height=84,
                elem_id="restore",
                elem_classes="drop",
            )
        with gr.Column(scale=7, min_width=320):
            panel = lay_out_drawing(*IDLE, "")
            again = gr.Button("Use these settings", visible=False, size="sm", elem_id="again")
            with gr.Accordion("History", open=False) as accordion:
                history = gr.Gallery(
                    label="Newest first", columns=6, height="auto", object_fit="contain",
                    allow_preview=False, elem_id="history", interactive=False,
                )  # fmt: skip
    _connect_drawing(studio, settings, chooser, regions, go, stop, panel)
    connect_restore(
        studio, RestorePanel(settings, chooser, regions, drop, again, accordion, history, panel)
    )  # fmt: skip
    refresh_chips = _connect_chips(studio, chooser, prompt, chips)
    gr.on(
        [settings.width.change, settings.height.change], None, [settings.width, settings.height],
        js=RATIO_JS, api_visibility="private",
    )  # fmt: skip
    chooser.chosen.change(
        box_adapters, [chooser.names, regions.adapter], regions.adapter,
        show_progress="hidden", api_visibility="private",
    )  # fmt: skip
    return BuiltTab([refresh_adapters, refresh_chips]), chooser


def _lay_out_prompt() -> tuple[gr.Textbox, gr.Dataset]:
    prompt = gr.Textbox(
        value="",
        label="Prompt",
        lines=1,
        max_lines=8,
        placeholder="a cat on a blue background",
        autofocus=True,
        elem_id="prompt",
    )
    chips = gr.Dataset(
        components=["textbox"],
        samples=[],
        label="Trigger words: click to add one to the prompt",
        visible=False,
        elem_id="chips",
    )
    return prompt, chips


def _connect_chips(
    studio: Studio, chooser: Chooser, prompt: gr.Textbox, chips: gr.Dataset
) -> Refresh:
    @with_messages
    def triggers(names: list[str], request: gr.Request):
        known = library.cards(studio.space(request))
        words = [word for card in known if card.name in names for word in card.triggers()]
        samples = [[word] for word in dict.fromkeys(words)]
        return gr.Dataset(samples=samples, visible=bool(samples))

    def insert(text: str, sample: list[str]) -> str:
        return f"{text.rstrip()} {sample[0]}".lstrip() + " "

    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    chooser.chosen.change(triggers, chooser.names, chips, **quiet)
    chips.click(insert, [prompt, chips], prompt, **quiet)
    return Refresh(triggers, [chips], [chooser.names])


def _connect_drawing(
    studio: Studio,
    settings: Fields,
    chooser: Chooser,
    regions: RegionPanel,
    go: gr.Button,
    stop: gr.Button,
    panel: DrawingPanel,
) -> None:
    own, weighted, boxed = settings.all(), chooser.inputs(), regions.inputs()

    @with_messages
    def draw(request: gr.Request, *values: Any):
        fields, rest = values[: len(own)], values[len(own) :]
        (names, *weights), boxes = rest[: MAX_ADAPTERS + 1], edited(*rest[MAX_ADAPTERS + 1 :])
        wanted, space = named(fields), studio.space(request)
        requests = requests_of(wanted, region_texts(boxes, names))
        adapters = library.with_weights(space, chosen_with_weights(names, weights))
        check_pictures(requests[0], len(requests), adapters)
        yield {settings.seed: requests[0].seed, panel.facts: ""}
        seen = 0
        for state in drawing(studio, space, requests, adapters, wanted["base"]):
            updates: dict[Any, Any] = {panel.stage: state.stage}
            if len(state.done) > seen:
                updates[panel.made] = gr.Gallery(value=links_to(state.done), visible=True)
                updates[panel.names] = [path.name for path in state.done]
                seen = len(state.done)
            yield updates
        if not seen:
            yield {panel.stage: panel.idle}

    event = gr.on(
        [go.click, settings.prompt.submit, settings.negative.submit, regions.prompt.submit],
        draw,
        [*own, *weighted, *boxed],
        [panel.stage, panel.made, panel.names, panel.facts, settings.seed],
        concurrency_id=DEVICE,
        concurrency_limit=1,
        show_progress="hidden",
        trigger_mode="once",
        api_visibility="private",
    )

    def rest(names: list[str]) -> str:
        return "" if names else panel.idle

    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    event.failure(rest, panel.names, panel.stage, **quiet)
    stop.click(rest, panel.names, panel.stage, cancels=[event], queue=False, **quiet)
