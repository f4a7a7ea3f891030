"""Fuse: several adapters into one; what interferes is shown before, pictures before and after."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import gradio as gr

from rite_diffusion.errors import RiteError
from rite_diffusion.studio import fusing
from rite_diffusion.studio.background import followed
from rite_diffusion.studio.conflicts import fusion_html
from rite_diffusion.studio.page import empty_state, shown, tell, with_messages
from rite_diffusion.studio.state import DEVICE, Studio
from rite_diffusion.studio.tabs import Built
from rite_diffusion.studio.tabs.adapters import MOST, Chooser, build_chooser, chosen_with_weights
from rite_diffusion.studio.tabs.drawing import drawing, waiting_html
from rite_diffusion.studio.tabs.fields import optional_number, whole_number
from rite_diffusion.studio.workspace import Workspace

METHODS = {
    "gram": "keeps what each concept does with its own inputs",
    "concat": "the plain sum, which side by side is",
    "weighted": "the plain sum in as few ranks as it needs",
    "svd": "the plain sum cut to a rank",
    "ties": "large entries whose signs agree",
    "dare": "entries left out at random",
    "knots": "ties in directions that the updates share",
    "custom_diffusion": "a few inputs of each come out exactly",
    "gradient": "what gram solves, by slow descent",
}
NO_FUSION = empty_state(
    "Choose two adapters or more",
    "“Show conflicts” tells what would interfere and what the fusion makes of it. “Fuse” draws the "
    "same prompts before and after. Nothing is kept until you save it.",
)


@dataclass(frozen=True)
class FusePanel:
    """What a fusion fills."""

    stage: gr.HTML
    report: gr.HTML
    sides: gr.Gallery
    keeping: gr.Group
    name: gr.Textbox
    draft: gr.State  # name of the fused adapter's file
    preview: gr.State  # name of the first picture drawn with it

    def shown(self) -> list[Any]:
        """The components in order."""
        return [
            self.stage, self.report, self.sides, self.keeping, self.name, self.draft, self.preview
        ]  # fmt: skip


def build(studio: Studio) -> Built:
    """Lay the tab out and connect it."""
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
    return Built([refresh_adapters])


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
            handler, [*fields, *chooser.inputs()], panel.shown(), show_progress="hidden",
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


def _ordered(
    space: Workspace, method: str, rank: str, allow_loss: bool, *chosen: Any
) -> fusing.Order:
    """The fusion that the form asks for."""
    pairs = chosen_with_weights(chosen[0], chosen[1 : MOST + 1])
    largest = whole_number(rank, "the largest rank")
    return fusing.order_of(space, pairs, method, largest, allow_loss)


def _preview_handler(studio: Studio, panel: FusePanel) -> Callable:
    @with_messages
    def preview_fusion(
        request: gr.Request, method: str, rank: str, allow_loss: bool, _: str, *chosen: Any
    ):
        space = studio.space(request)
        order = _ordered(space, method, rank, allow_loss, *chosen)
        yield _begun(panel)
        work = followed(lambda progress: fusing.preview_fusion(studio, space, order, progress))
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
        order = _ordered(space, method, rank, allow_loss, *chosen)
        draft = fusing.new_draft(space)
        yield _begun(panel)
        work = followed(lambda progress: fusing.fuse(studio, space, order, draft, progress))
        for kind, what in work:
            if kind == "progress":
                yield {panel.stage: waiting_html(*what)}
            else:
                yield {panel.report: fusion_html(what)}
        try:
            yield from _compared(studio, space, panel, order, draft, prompt)
        except RiteError as error:  # the base may not be here; the fusion is none the worse
            tell(f"No pictures: {error}")
        yield {
            panel.stage: "",
            panel.keeping: gr.Group(visible=True),
            panel.name: order.title(),
            panel.draft: draft.name,
        }

    return fuse_and_compare


def _begun(panel: FusePanel) -> dict[Any, Any]:
    """What was there goes."""
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
    order: fusing.Order,
    draft: Path,
    prompt: str,
) -> Iterator[dict[Any, Any]]:
    """The same prompts and seed with the adapters side by side, then with the fused one."""
    from rite_diffusion.generation.request import PictureRequest

    prompts = [prompt.strip()] if prompt.strip() else fusing.prompts_to_compare(order.cards)
    requests = [PictureRequest(prompt=text) for text in prompts]
    halves: list[list[Path]] = []
    for adapters in (order.files(), [f"{draft}:1"]):
        done: list[Path] = []
        for state in drawing(studio, space, requests, adapters, ""):
            done = state.done
            yield {panel.stage: state.stage}
        halves.append(done)
    before, after = halves
    pairs = [
        pair
        for text, left, right in zip(prompts, before, after, strict=False)
        for pair in ((shown(left), f"before: {text}"), (shown(right), f"after: {text}"))
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
        tell(f"'{fusing.keep(space, draft, name, picture)}' is in the library.")
        return gr.Group(visible=False), ""

    gr.on(
        [keep.click, panel.name.submit], save, [panel.name, panel.draft, panel.preview],
        [panel.keeping, panel.draft], api_visibility="private",
    )  # fmt: skip
