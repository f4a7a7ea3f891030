"""Generate: a prompt, adapters with weights, regions, pictures as they form and their history."""

from typing import Any

import gradio as gr

from rite_diffusion.studio import library
from rite_diffusion.studio.boxes import region_texts
from rite_diffusion.studio.page import shown_all, with_messages
from rite_diffusion.studio.state import DEVICE, Studio
from rite_diffusion.studio.tabs import Built, Refresh
from rite_diffusion.studio.tabs.adapters import MOST, Chooser, build_chooser, chosen_with_weights
from rite_diffusion.studio.tabs.drawing import Easel, drawing, lay_out_easel
from rite_diffusion.studio.tabs.fields import Fields, lay_out_fields, named, requests_of
from rite_diffusion.studio.tabs.history import Recall, connect_recall
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


def build(studio: Studio) -> tuple[Built, Chooser]:
    """Lay the tab out and connect it; also returns where its adapters are chosen."""
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
            easel = lay_out_easel(*IDLE, "")
            again = gr.Button("Use these settings", visible=False, size="sm", elem_id="again")
            with gr.Accordion("History", open=False) as fold:
                history = gr.Gallery(
                    label="Newest first", columns=6, height="auto", object_fit="contain",
                    allow_preview=False, elem_id="history", interactive=False,
                )  # fmt: skip
    _connect_drawing(studio, settings, chooser, regions, go, stop, easel)
    connect_recall(
        studio, Recall(settings, chooser, regions, drop, again, fold, history, easel)
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
    return Built([refresh_adapters, refresh_chips]), chooser


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
    easel: Easel,
) -> None:
    own, weighted, boxed = settings.all(), chooser.inputs(), regions.inputs()

    @with_messages
    def draw(request: gr.Request, *values: Any):
        fields, rest = values[: len(own)], values[len(own) :]
        (names, *weights), boxes = rest[: MOST + 1], edited(*rest[MOST + 1 :])
        wanted, space = named(fields), studio.space(request)
        requests = requests_of(wanted, region_texts(boxes, names))
        adapters = library.with_weights(space, chosen_with_weights(names, weights))
        yield {settings.seed: requests[0].seed, easel.facts: ""}
        seen = 0
        for state in drawing(studio, space, requests, adapters, wanted["base"]):
            told: dict[Any, Any] = {easel.stage: state.stage}
            if len(state.done) > seen:
                told[easel.made] = gr.Gallery(value=shown_all(state.done), visible=True)
                told[easel.names] = [path.name for path in state.done]
                seen = len(state.done)
            yield told
        if not seen:
            yield {easel.stage: easel.idle}

    event = gr.on(
        [go.click, settings.prompt.submit, settings.negative.submit, regions.prompt.submit],
        draw,
        [*own, *weighted, *boxed],
        [easel.stage, easel.made, easel.names, easel.facts, settings.seed],
        concurrency_id=DEVICE,
        concurrency_limit=1,
        show_progress="hidden",
        trigger_mode="once",
        api_visibility="private",
    )

    def rest(names: list[str]) -> str:
        return "" if names else easel.idle

    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    event.failure(rest, easel.names, easel.stage, **quiet)
    stop.click(rest, easel.names, easel.stage, cancels=[event], queue=False, **quiet)
