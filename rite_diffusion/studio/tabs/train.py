"""Train: photos and settings on the left, runs on the right."""

from dataclasses import dataclass, fields
from typing import Any

import gradio as gr

from rite_diffusion.errors import StudioError
from rite_diffusion.studio import library
from rite_diffusion.studio.checks import check_training
from rite_diffusion.studio.page import show_note, with_messages
from rite_diffusion.studio.presets import PURPOSES, STANDARD, training_settings
from rite_diffusion.studio.state import Studio
from rite_diffusion.studio.tabs import BuiltTab, UseButton
from rite_diffusion.studio.tabs.fields import optional_number, whole_number
from rite_diffusion.studio.tabs.photos import PhotoPanel, build_photos
from rite_diffusion.studio.tabs.runs import RunPanel, build_runs
from rite_diffusion.studio.tabs.set_actions import build_set_actions
from rite_diffusion.studio.workspace import Workspace, name_from


@dataclass(frozen=True)
class SettingFields:
    """The fields of a training's settings, without photos and concept."""

    run_name: gr.Textbox
    purpose: gr.Radio
    base: gr.Textbox
    steps: gr.Textbox
    rank: gr.Textbox
    batch: gr.Textbox
    optimizer: gr.Dropdown
    rate: gr.Textbox
    seed: gr.Number
    every: gr.Textbox
    prompts: gr.Textbox
    lines: gr.Textbox

    def all(self) -> list[Any]:
        """The components in order."""
        return [getattr(self, field.name) for field in fields(self)]


def build(studio: Studio) -> BuiltTab:
    """Make the tab and connect its events."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=6, min_width=320):
            panel, refresh_photos = build_photos(studio)
            build_set_actions(studio, panel)
            settings = _lay_out_settings()
            with gr.Row():
                check = gr.Button("Check first", scale=1, min_width=110, elem_id="check")
                start = gr.Button("Start training", variant="primary", scale=2, elem_id="start")
            report = gr.Textbox(
                value="", label="Report", lines=10, max_lines=24, visible=False, interactive=False,
                elem_classes="mono", buttons=["copy"], elem_id="report",
            )  # fmt: skip
        with gr.Column(scale=6, min_width=320):
            runs, refresh_runs = build_runs(studio)
    _connect(studio, panel, settings, check, start, report, runs)
    use = UseButton(runs.buttons["use"], runs.name, library.of_run)
    return BuiltTab([refresh_photos, refresh_runs], use)


def _lay_out_settings() -> SettingFields:
    purpose = gr.Radio(
        [(purpose.label, name) for name, purpose in PURPOSES.items()],
        value=STANDARD,
        label="What it is for",
        elem_id="purpose",
    )
    with gr.Accordion("Advanced settings", open=False, elem_id="advanced") as accordion:
        with gr.Row():
            run_name = gr.Textbox(
                "", label="Name of the run", placeholder="the class", min_width=140
            )
            base = gr.Textbox("", label="Base model", placeholder="pocket", min_width=140)
        with gr.Row():
            steps = optional_number("Steps", "steps")
            rank = optional_number("Rank", "rank")
            batch = optional_number("Batch", "batch")
            seed = gr.Number(0, label="Seed", precision=0, min_width=80)
        with gr.Row():
            optimizer = gr.Dropdown([""], value="", label="Optimizer", min_width=120)
            rate = gr.Textbox("", label="Learning rate", placeholder="1e-3 or auto", min_width=120)
            every = optional_number("Previews every … steps", "every")
        prompts = gr.Textbox(
            value="",
            label="Preview prompts, one a line",
            lines=2,
            placeholder="a {trigger} on the beach",
        )
        lines = gr.Textbox(
            value="", label="Other settings, one a line", lines=2,
            placeholder="augment.flip = true", elem_classes="mono",
        )  # fmt: skip
        gr.HTML("<small>Empty fields follow from the purpose and the base model.</small>")
    accordion.expand(_optimizers, None, optimizer, show_progress="hidden", api_visibility="private")
    return SettingFields(
        run_name, purpose, base, steps, rank, batch, optimizer, rate, seed, every, prompts, lines
    )


def _optimizers() -> gr.Dropdown:
    """The list of optimizers; filled late, as that imports torch."""
    from rite_diffusion.optim import OPTIMIZERS

    return gr.Dropdown(choices=["", *sorted(OPTIMIZERS)])


def _connect(
    studio: Studio,
    panel: PhotoPanel,
    settings: SettingFields,
    check: gr.Button,
    start: gr.Button,
    report: gr.Textbox,
    runs: RunPanel,
) -> None:
    @with_messages
    def submit(request: gr.Request, *values: Any):
        studio.reports.end(request.session_hash or "")  # the process leaves the device to the run
        space = studio.space(request)
        wanted = _named(values)
        tree = _settings(space, wanted)
        for line in check_training(space, tree):
            show_note(f"Not used: {line}")
        folder = space.new("runs", name_from(wanted["run_name"] or wanted["class_noun"], "run"))
        studio.queue.submit(folder, tree)
        show_note(f"'{folder.name}' is in the queue. It goes on when you close this page.")
        return gr.Dropdown(choices=space.names("runs"), value=folder.name, visible=True)

    @with_messages
    def dry_run(request: gr.Request, *values: Any):
        yield gr.Textbox(value="", visible=False)  # an earlier report
        space = studio.space(request)
        tree = _settings(space, _named(values))
        check_training(space, tree)
        yield gr.Textbox(value="reading the photos, opening the base model …", visible=True)
        yield from studio.reports.make(tree, request.session_hash or "")

    inputs = [
        panel.name, panel.captions, panel.trigger, panel.class_noun, *settings.all(),
    ]  # fmt: skip
    start.click(submit, inputs, runs.name, api_visibility="private")
    check.click(
        dry_run, inputs, report, show_progress="minimal", api_visibility="private",
    )  # fmt: skip


def _named(values: tuple[Any, ...]) -> dict[str, Any]:
    names = ["photos", "captions", "trigger", "class_noun"]
    return dict(zip([*names, *(f.name for f in fields(SettingFields))], values, strict=True))


def _settings(space: Workspace, wanted: dict[str, Any]) -> dict[str, Any]:
    """The settings tree of the fields' values; also writes the captions beside the photos."""
    from rite_diffusion.studio.photo_sets import write_captions

    if not wanted["photos"]:
        raise StudioError("choose a photo set first, or drop some photos.")
    if not wanted["trigger"].strip() or not wanted["class_noun"].strip():
        raise StudioError("write a trigger, such as <robot>, and what it is, such as robot.")
    folder = space.find("photos", wanted["photos"])
    write_captions(folder, wanted["captions"])
    needed = {
        "photos": str(folder),
        "trigger": wanted["trigger"].strip(),
        "class_noun": wanted["class_noun"].strip(),
        "base": space.base(wanted["base"]) or "pocket",
    }
    return training_settings(wanted["purpose"], needed, _chosen(wanted), wanted["lines"])


def _chosen(wanted: dict[str, Any]) -> dict[str, Any]:
    """The advanced fields that were filled in, as a settings tree."""
    rate = wanted["rate"].strip()
    prompts = [line.strip() for line in wanted["prompts"].splitlines() if line.strip()]
    tree = {
        "steps": whole_number(wanted["steps"], "steps"),
        "batch": whole_number(wanted["batch"], "batch"),
        "seed": wanted["seed"],
        "lora": {"rank": whole_number(wanted["rank"], "rank")},
        "optim": {"name": wanted["optimizer"], "lr": _number_or_word(rate) if rate else None},
        "previews": {"every": whole_number(wanted["every"], "previews"), "prompts": prompts},
    }
    return _without_empty(tree)


def _without_empty(tree: dict[str, Any]) -> dict[str, Any]:
    """The tree without empty values."""
    inner = {k: _without_empty(v) if isinstance(v, dict) else v for k, v in tree.items()}
    return {key: value for key, value in inner.items() if value not in (None, "", [], {})}


def _number_or_word(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
