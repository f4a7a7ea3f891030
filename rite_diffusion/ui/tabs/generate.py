"""Generate: a prompt, adapters with weights, pictures as they form, and every one's history."""

from pathlib import Path
from typing import Any

import gradio as gr

from rite_diffusion.ui import library
from rite_diffusion.ui.page import empty_state, in_words, shown_all
from rite_diffusion.ui.studio import DEVICE, Studio
from rite_diffusion.ui.tabs import Refresh
from rite_diffusion.ui.tabs.adapters import (
    MOST,
    Chooser,
    build_chooser,
    chosen_with_weights,
)
from rite_diffusion.ui.tabs.fields import Fields, lay_out_fields, named, wishes_of
from rite_diffusion.ui.tabs.history import connect_pictures
from rite_diffusion.ui.tabs.stage import forming, opening

IDLE = empty_state(
    "Your pictures appear here",
    "Write a prompt and press Enter. To draw something of your own, train it first in the Train "
    "tab, choose its adapter, and use its trigger word.",
)


def _lay_out_prompt() -> tuple[gr.Textbox, gr.Dataset]:
    prompt = gr.Textbox(
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


def build(studio: Studio) -> list[Refresh]:
    """Lay the tab out and connect it."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=5, min_width=320):
            prompt, chips = _lay_out_prompt()
            with gr.Row():
                go = gr.Button("Generate", variant="primary", scale=3, elem_id="generate")
                stop = gr.Button("Stop", scale=1, min_width=80, elem_id="stop")
            chooser, refresh_adapters = build_chooser(studio)
            settings = lay_out_fields(prompt)
            drop = gr.File(
                label="Drop a picture that was made here to restore its settings",
                file_types=[".png"],
                height=110,
                elem_id="restore",
            )
        with gr.Column(scale=7, min_width=320):
            stage = gr.HTML(IDLE, elem_id="stage")
            made = gr.Gallery(
                label="Pictures", columns=4, height="auto", object_fit="contain", visible=False,
                buttons=["download", "fullscreen"], elem_id="made", interactive=False,
            )  # fmt: skip
            facts = gr.HTML("", elem_id="facts")
            again = gr.Button("Use these settings", visible=False, elem_id="again")
            with gr.Accordion("History", open=False) as history_fold:
                history = gr.Gallery(
                    label="Newest first", columns=6, height="auto", object_fit="contain",
                    allow_preview=False, elem_id="history", interactive=False,
                )  # fmt: skip
    names = gr.State([])  # of the pictures in `made`
    _connect_drawing(studio, settings, chooser, go, stop, stage, made, names)
    connect_pictures(
        studio, settings, chooser, drop, made, names, history_fold, history, facts, again
    )
    refresh_chips = _connect_chips(studio, chooser, prompt, chips)
    return [refresh_adapters, refresh_chips]


def _connect_chips(
    studio: Studio, chooser: Chooser, prompt: gr.Textbox, chips: gr.Dataset
) -> Refresh:
    @in_words
    def triggers(names: list[str], request: gr.Request):
        known = library.cards(studio.space(request))
        words = [word for card in known if card.name in names for word in card.triggers()]
        samples = [[word] for word in dict.fromkeys(words)]
        return gr.Dataset(samples=samples, visible=bool(samples))

    def insert(text: str, sample: list[str]) -> str:
        return f"{text.rstrip()} {sample[0]}".lstrip() + " "

    quiet = {"show_progress": "hidden", "api_visibility": "private"}
    chooser.names.change(triggers, chooser.names, chips, **quiet)
    chips.click(insert, [prompt, chips], prompt, **quiet)
    return Refresh(triggers, [chips], [chooser.names])


def _connect_drawing(
    studio: Studio,
    settings: Fields,
    chooser: Chooser,
    go: gr.Button,
    stop: gr.Button,
    stage: gr.HTML,
    made: gr.Gallery,
    names: gr.State,
) -> None:
    @in_words
    def draw(request: gr.Request, *values: Any):
        wanted, adapters = named(values[: -MOST - 1]), values[-MOST - 1 :]
        space = studio.space(request)
        wishes = wishes_of(wanted)
        yield {stage: opening(), settings.seed: wishes[0].seed}
        drawing = studio.engine.draw(
            space,
            wishes,
            library.with_weights(space, chosen_with_weights(adapters[0], adapters[1:])),
            wanted["base"],
        )
        done: list[Path] = []
        for frame in drawing:
            if frame.path is not None:
                done.append(frame.path)
                yield {
                    stage: forming(frame, len(done), len(wishes)),
                    made: gr.Gallery(value=shown_all(done), visible=True),
                    names: [path.name for path in done],
                }
            elif frame.image is not None:
                yield {stage: forming(frame, len(done), len(wishes))}
        yield {stage: "" if done else IDLE}

    event = gr.on(
        [go.click, settings.prompt.submit, settings.negative.submit],
        draw,
        [*settings.all(), *chooser.inputs()],
        [stage, made, names, settings.seed],
        concurrency_id=DEVICE,
        concurrency_limit=1,
        show_progress="hidden",
        trigger_mode="once",
        api_visibility="private",
    )
    stop.click(
        lambda names: "" if names else IDLE,
        names,
        stage,
        cancels=[event],
        queue=False,
        api_visibility="private",
    )
