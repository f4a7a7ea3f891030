"""Fuse: several adapters into one, with the report of what interferes, before it is kept."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from rite_diffusion.types import StudioError
from rite_diffusion.ui import library
from rite_diffusion.ui.background import followed
from rite_diffusion.ui.library import Card
from rite_diffusion.ui.page import empty_state, in_words, progress_bar, shown, tell
from rite_diffusion.ui.studio import DEVICE, Studio
from rite_diffusion.ui.tabs import Refresh
from rite_diffusion.ui.tabs.adapters import MOST, build_chooser, chosen_with_weights
from rite_diffusion.ui.workspace import Workspace, checked_name, name_from

STANDARD = "gram"
NO_FUSION = empty_state(
    "Choose two adapters or more",
    "The report shows what would interfere and what the fusion makes of it. Nothing is kept until "
    "you save it.",
)


def build(studio: Studio) -> list[Refresh]:
    """Lay the tab out and connect it."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=5, min_width=320):
            chooser, refresh_adapters = build_chooser(studio)
            with gr.Row():
                method = gr.Dropdown([STANDARD], value=STANDARD, label="Method", min_width=140)
                rank = gr.Number(None, label="Largest rank", precision=0, min_width=110)
            prompt = gr.Textbox(
                label="Prompt to compare with", placeholder="all triggers beside each other"
            )
            with gr.Row():
                go = gr.Button("Fuse", variant="primary", scale=2, elem_id="fuse")
                stop = gr.Button("Stop", scale=1, min_width=80)
            with gr.Group(visible=False) as keeping:
                name = gr.Textbox(label="Name in the library", max_length=64)
                keep = gr.Button("Save to the library", variant="primary", elem_id="keep-fused")
        with gr.Column(scale=7, min_width=320):
            stage = gr.HTML(NO_FUSION, elem_id="fuse-stage")
            sides = gr.ImageSlider(
                label="Side by side without fusion (left), fused (right)", type="filepath",
                visible=False, interactive=False, elem_id="sides",
            )  # fmt: skip
            report = gr.Image(
                label="Conflict report", type="filepath", visible=False, interactive=False,
                buttons=["download", "fullscreen"], elem_id="conflicts",
            )  # fmt: skip

    @in_words
    def fuse(request: gr.Request, method: str, rank: float | None, prompt: str, *chosen: Any):
        space = studio.space(request)
        pairs = chosen_with_weights(chosen[0], chosen[1 : MOST + 1])
        if len(pairs) < 2:
            raise StudioError("choose two adapters or more: one alone is fused already.")
        settings = {"rank": int(rank)} if rank else {}
        made = None
        yield {stage: _waiting("Reading the adapters…"), keeping: gr.Group(visible=False)}
        for kind, what in _fusing(space, pairs, method, settings):
            if kind == "heard":
                yield {stage: _waiting(f"Picture {what[0]} for the statistics")}
            else:
                made = what
        if made is None:
            return
        yield {stage: _waiting("Drawing the comparison…"), report: _image(made.sheet)}
        cards = [library.find(space, each) for each, _ in pairs]
        yield {
            stage: "",
            sides: _compared(studio, space, prompt or together(cards), pairs, made.adapter),
            name: name_from(" + ".join(each for each, _ in pairs), "fused"),
            keeping: gr.Group(visible=True),
        }

    @in_words
    def save(name: str, request: gr.Request):
        space = studio.space(request)
        source = draft(space)
        if not source.exists():
            raise StudioError("fuse some adapters first: there is nothing to save.")
        target = space.new("adapters", checked_name(name.strip()), library.SUFFIX)
        shutil.move(source, target)
        tell(f"'{target.stem}' is in the library.")
        return gr.Group(visible=False)

    event = go.click(
        fuse, [method, rank, prompt, *chooser.inputs()],
        [stage, sides, report, name, keeping],
        show_progress="hidden", concurrency_id=DEVICE, concurrency_limit=1,
        trigger_mode="once", api_visibility="private",
    )  # fmt: skip
    stop.click(lambda: NO_FUSION, None, stage, cancels=[event], api_visibility="private")
    keep.click(save, name, keeping, api_visibility="private")
    return [refresh_adapters, Refresh(_methods, [method])]


def _methods() -> gr.Dropdown:
    from rite_diffusion.fusion import FUSIONS

    return gr.Dropdown(choices=list(FUSIONS))


def draft(space: Workspace) -> Path:
    """Where a fused adapter lies until it is saved."""
    return space.folder("drafts") / f"fused{library.SUFFIX}"


def _fusing(
    space: Workspace, pairs: list[tuple[str, float]], method: str, settings: dict[str, Any]
) -> Iterator[tuple[str, Any]]:
    """The reports of a fusion of names and weights into the draft, then its outcome."""
    from rite_diffusion.merging import fuse_and_report

    adapters = library.with_weights(space, pairs)
    base = library.base_of(space, [name for name, _ in pairs])
    return followed(
        lambda listen: fuse_and_report(
            adapters, method=method, out=draft(space), base=base, listen=listen, **settings
        )
    )


def together(cards: list[Card]) -> str:
    """A prompt that calls every adapter's first concept."""
    words = [card.triggers()[0] for card in cards if card.triggers()]
    if len(words) == 2:
        return f"a {words[0]} on the left and a {words[1]} on the right on a blue background"
    return f"{' and '.join(f'a {word}' for word in words)} on a blue background"


def _compared(
    studio: Studio, space: Workspace, prompt: str, pairs: list[tuple[str, float]], fused: Path
) -> gr.ImageSlider:
    """The same prompt and seed with the adapters side by side and with the fused one."""
    from rite_diffusion.ui.engine import Wish

    paths = []
    for adapters in (library.with_weights(space, pairs), [f"{fused}:1"]):
        frames = studio.engine.draw(space, [Wish(prompt)], adapters)
        paths += [shown(frame.path) for frame in frames if frame.path]
    return gr.ImageSlider(value=(paths[0], paths[1]), visible=True)


def _image(path: Path) -> gr.Image:
    return gr.Image(value=shown(path), visible=True)


def _waiting(text: str) -> str:
    return f'<div class="stage">{progress_bar(0)}<p>{text}</p></div>'
