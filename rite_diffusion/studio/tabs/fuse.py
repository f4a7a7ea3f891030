"""Fuse: several adapters into one, with a conflict report and pictures before and after."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import gradio as gr

from rite_diffusion.errors import RiteError
from rite_diffusion.studio import fusing
from rite_diffusion.studio.background import run_with_progress
from rite_diffusion.studio.conflicts import fusion_html
from rite_diffusion.studio.page import empty_state, link_to, show_note, with_messages
from rite_diffusion.studio.state import DEVICE, Studio
from rite_diffusion.studio.tabs import BuiltTab
from rite_diffusion.studio.tabs.adapters import (
    MAX_ADAPTERS,
    Chooser,
    build_chooser,
    chosen_with_weights,
)
from rite_diffusion.studio.tabs.drawing import drawing, waiting_html
from rite_diffusion.studio.tabs.fields import optional_number, whole_number
from rite_diffusion.studio.workspace import Workspace

METHODS = {
    "gram": "keeps each concept's outputs on its own inputs",
    "concat": "the plain sum, the same as attaching all",
    "weighted": "the plain sum at the smallest rank that holds it",
    "svd": "the plain sum cut to a rank",
    "ties": "large entries whose signs agree",
    "dare": "entries left out at random",
    "knots": "ties in directions that the updates share",
    "custom_diffusion": "a few inputs of each come out exactly",
    "gradient": "the same problem as gram, by gradient descent",
}
STEPS: int | None = None  # of the pictures before and after; None: the base's default
NO_FUSION = empty_state(
    "Choose two adapters or more",
    "“Show conflicts” reports how the adapters interfere before and after fusing. “Fuse” draws the "
    "same prompts before and after. The result is temporary until you save it.",
)


@dataclass(frozen=True)
class FusePanel:
    """The components that a fusion fills."""

    stage: gr.HTML
    report: gr.HTML
    sides: gr.Gallery
    keeping: gr.Group
    name: gr.Textbox
    draft: gr.State  # name of the fused adapter's file
    preview: gr.State  # name of the first picture drawn with it

    def outputs(self) -> list[Any]:
        """The components in fusion."""
        return [
            self.stage, self.report, self.sides, self.keeping, self.name, self.draft, self.preview
        ]  # fmt: skip


def build(studio: Studio) -> BuiltTab:
    """Make the tab and connect its events."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=5, min_width=320):
            chooser, refresh_adapters = build_chooser(studio)
            method = gr.Dropdown(
                list(METHODS), value="gram", label="Method", info=METHODS["gram"],
                elem_id="fuse-method",
            )  # fmt: skip
            with gr.Row():
                rank = optional_number("Largest rank", "fuse-rank")
                loss = gr.Checkbox(
                    False, label="Allow loss", info="even where the rank cuts off more than 1 %",
                    min_width=140, elem_id="fuse-loss",
                )  # fmt: skip
                prompt = gr.Textbox("", label="Prompt to compare with", min_width=180, scale=2,
                                    placeholder="each concept, and all together")  # fmt: skip
            with gr.Row():
                check = gr.Button("Show conflicts", min_width=130, elem_id="conflicts")
                go = gr.Button("Fuse", variant="primary", min_width=110, elem_id="fuse")
                stop = gr.Button("Stop", scale=0, min_width=80, elem_id="fuse-stop")
            with gr.Group(visible=False, elem_id="keeping") as keeping:
                name = gr.Textbox(
                    "", label="Name in the library", max_length=64, elem_id="fused-name"
                )
                keep = gr.Button("Save to the library", variant="primary", elem_id="keep-fused")
        with gr.Column(scale=7, min_width=320):
            stage = gr.HTML(NO_FUSION, elem_id="fuse-stage")
            sides = gr.Gallery(
                label="Before (left): side by side, not fused. After (right): fused.",
                columns=2, height="auto", object_fit="contain", visible=False, interactive=False,
                buttons=["fullscreen"], elem_id="sides",
            )  # fmt: skip
            report = gr.HTML("", elem_id="conflict-report")
    panel = FusePanel(stage, report, sides, keeping, name, gr.State(""), gr.State(""))
    _connect(studio, panel, chooser, [method, rank, loss, prompt], check, go, stop)
    _connect_keeping(studio, panel, keep)
    method.change(
        lambda name: gr.Dropdown(info=METHODS[name]), method, method, show_progress="hidden",
        api_visibility="private",
    )  # fmt: skip
    return BuiltTab([refresh_adapters])


def _connect(
    studio: Studio,
    panel: FusePanel,
    chooser: Chooser,
    fields: list[Any],
    check: gr.Button,
    go: gr.Button,
    stop: gr.Button,
) -> None:
    handlers = ((check, _preview_handler(studio, panel)), (go, _fusion_handler(studio, panel)))
    events = [
        button.click(
            handler, [*fields, *chooser.inputs()], panel.outputs(), show_progress="hidden",
            concurrency_id=DEVICE, concurrency_limit=1, trigger_mode="once",
            api_visibility="private",
        )
        for button, handler in handlers
    ]  # fmt: skip
    for event in events:
        event.failure(
            lambda: NO_FUSION, None, panel.stage, show_progress="hidden", api_visibility="private"
        )
    stop.click(
        lambda: NO_FUSION, None, panel.stage, cancels=cast(Any, events), queue=False,
        api_visibility="private",
    )  # fmt: skip


def _requested(
    space: Workspace, method: str, rank: str, allow_loss: bool, *chosen: Any
) -> fusing.FusionRequest:
    """The request that the fields' values make."""
    pairs = chosen_with_weights(chosen[0], chosen[1 : MAX_ADAPTERS + 1])
    largest = whole_number(rank, "the largest rank")
    return fusing.fusion_request(space, pairs, method, largest, allow_loss)


def _preview_handler(studio: Studio, panel: FusePanel) -> Callable:
    @with_messages
    def preview_fusion(
        request: gr.Request, method: str, rank: str, allow_loss: bool, _: str, *chosen: Any
    ):
        space = studio.space(request)
        fusion = _requested(space, method, rank, allow_loss, *chosen)
        yield _begun(panel)
        work = run_with_progress(
            lambda progress: fusing.preview_fusion(studio, space, fusion, progress)
        )
        for kind, what in work:
            if kind == "progress":
                yield {panel.stage: waiting_html(*what)}
            else:
                yield {panel.stage: "", panel.report: fusion_html(what)}

    return preview_fusion


def _fusion_handler(studio: Studio, panel: FusePanel) -> Callable:
    @with_messages
    def fuse_and_compare(
        request: gr.Request, method: str, rank: str, allow_loss: bool, prompt: str, *chosen: Any
    ):
        space = studio.space(request)
        fusion = _requested(space, method, rank, allow_loss, *chosen)
        draft = fusing.new_draft(space)
        yield _begun(panel)
        work = run_with_progress(
            lambda progress: fusing.fuse(studio, space, fusion, draft, progress)
        )
        for kind, what in work:
            if kind == "progress":
                yield {panel.stage: waiting_html(*what)}
            else:
                yield {panel.report: fusion_html(what)}
        try:
            yield from _compared(studio, space, panel, fusion, draft, prompt)
        except RiteError as error:  # the base may not be here; the fused adapter is still good
            show_note(f"No pictures: {error}")
        yield {
            panel.stage: "",
            panel.keeping: gr.Group(visible=True),
            panel.name: fusion.title(),
            panel.draft: draft.name,
        }

    return fuse_and_compare


def _begun(panel: FusePanel) -> dict[Any, Any]:
    """Values that clear the panel at the start of a fusion."""
    return {
        panel.stage: waiting_html("Reading the adapters…"),
        panel.report: "",
        panel.sides: gr.Gallery(visible=False),
        panel.keeping: gr.Group(visible=False),
        panel.preview: "",
    }


def _compared(
    studio: Studio,
    space: Workspace,
    panel: FusePanel,
    fusion: fusing.FusionRequest,
    draft: Path,
    prompt: str,
) -> Iterator[dict[Any, Any]]:
    """The same prompts and seed with the adapters side by side, then with the fused one."""
    from rite_diffusion.generation.request import PictureRequest

    prompts = [prompt.strip()] if prompt.strip() else fusing.prompts_to_compare(fusion.cards)
    requests = [PictureRequest(prompt=text, steps=STEPS) for text in prompts]
    halves: list[list[Path]] = []
    for adapters in (fusion.files(), [f"{draft}:1"]):
        done: list[Path] = []
        for state in drawing(studio, space, requests, adapters, ""):
            done = state.done
            yield {panel.stage: state.stage}
        halves.append(done)
    before, after = halves
    pairs = [
        pair
        for text, left, right in zip(prompts, before, after, strict=False)
        for pair in ((link_to(left), f"before: {text}"), (link_to(right), f"after: {text}"))
    ]
    yield {
        panel.sides: gr.Gallery(value=pairs, visible=bool(pairs)),
        panel.preview: after[0].name if after else "",
    }


def _connect_keeping(studio: Studio, panel: FusePanel, keep: gr.Button) -> None:
    @with_messages
    def save(name: str, draft: str, preview: str, request: gr.Request):
        space = studio.space(request)
        picture = space.find("outputs", preview) if preview else None
        show_note(f"'{fusing.save_draft(space, draft, name, picture)}' is in the library.")
        return gr.Group(visible=False), ""

    gr.on(
        [keep.click, panel.name.submit], save, [panel.name, panel.draft, panel.preview],
        [panel.keeping, panel.draft], api_visibility="private",
    )  # fmt: skip
