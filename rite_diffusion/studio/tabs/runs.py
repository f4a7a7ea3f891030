"""Runs: state, curves, previews, log; stop, save, sample, resume. Half of the Train tab."""

from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from rite_diffusion.studio.jobs import ACTIVE, state_of, was_refused
from rite_diffusion.studio.page import empty_state, link_to, progress_bar, show_note, with_messages
from rite_diffusion.studio.progress import Progress, loss_curves, rate_curve, read_progress
from rite_diffusion.studio.state import Studio
from rite_diffusion.studio.tabs import Refresh
from rite_diffusion.studio.theme import ACCENT, CURVES
from rite_diffusion.studio.workspace import Workspace

EVERY = 2.0  # seconds between refreshes of a run
MAX_PREVIEWS = 24
BUTTONS = {
    "use": "Draw with it", "stop": "Stop", "save": "Save now", "sample": "Sample now",
    "resume": "Resume",
}  # fmt: skip
NO_RUNS = empty_state(
    "No training yet",
    "Choose photos and press “Start training”. It is a process of its own: closing "
    "this page does not stop it.",
)


@dataclass(frozen=True)
class RunPanel:
    """The components that show a run."""

    name: gr.Dropdown
    status: gr.HTML
    waiting: gr.HTML
    loss: gr.LinePlot
    rate: gr.LinePlot
    previews: gr.Gallery
    log: gr.Textbox
    buttons: dict[str, gr.Button]
    seen: gr.State  # `sign` of what is shown, to redraw only after a change

    def outputs(self) -> list[Any]:
        """The components that `_show` has values for, in order."""
        own = [self.status, self.waiting, self.loss, self.rate, self.previews, self.log]
        return [*own, *self.buttons.values(), self.seen]


def build_runs(studio: Studio) -> tuple[RunPanel, Refresh]:
    """Make the components and connect their events."""
    panel = _lay_out()
    timer = gr.Timer(EVERY)
    quiet: dict[str, Any] = {
        "show_progress": "hidden",
        "api_visibility": "private",
        "concurrency_limit": None,
    }

    @with_messages
    def show(name: str | None, seen: str, request: gr.Request):
        return _show(studio, studio.space(request), name, seen)

    @with_messages
    def refresh(name: str | None, request: gr.Request):
        space = studio.space(request)
        known = space.names("runs")
        chosen = name if name in known else _default_run(space, known)
        shown_now = _show(studio, space, chosen, "")
        return [gr.Dropdown(choices=known, value=chosen, visible=bool(known)), *shown_now]

    timer.tick(show, [panel.name, panel.seen], panel.outputs(), **quiet)
    panel.name.change(show, [panel.name, gr.State("")], panel.outputs(), **quiet)
    for what, act in _actions(studio).items():
        done = panel.buttons[what].click(act, panel.name, None, **quiet)
        done.then(show, [panel.name, panel.seen], panel.outputs(), **quiet)
    return panel, Refresh(refresh, [panel.name, *panel.outputs()], [panel.name])


def _lay_out() -> RunPanel:
    name = gr.Dropdown([], label="Run", elem_id="run", visible=False)
    status = gr.HTML(NO_RUNS, elem_id="status")
    with gr.Row():
        buttons = {
            what: gr.Button(label, size="sm", min_width=84, visible=False, elem_id=f"run-{what}")
            for what, label in BUTTONS.items()
        }
    loss = gr.LinePlot(
        x="step", y="loss", color="curve", color_map=CURVES, title="Loss", height=230,
        visible=False, buttons=[], elem_id="loss",
    )  # fmt: skip
    previews = gr.Gallery(
        label="Previews, newest first", columns=6, height="auto", object_fit="contain",
        visible=False, interactive=False, elem_id="previews",
    )  # fmt: skip
    rate = gr.LinePlot(
        x="step", y="rate", title="Learning rate", height=150, y_axis_format=".1e",
        color_map={"rate": ACCENT}, visible=False, buttons=[], elem_id="rate",
    )  # fmt: skip
    waiting = gr.HTML("", elem_id="waiting")
    with gr.Accordion("Log", open=False):
        log = gr.Textbox(
            value="", show_label=False, lines=8, max_lines=16, interactive=False,
            elem_classes="mono", container=False, elem_id="log",
        )  # fmt: skip
    return RunPanel(name, status, waiting, loss, rate, previews, log, buttons, gr.State(""))


def _default_run(space: Workspace, names: list[str]) -> str | None:
    """The newest active run, else the newest."""
    live = [name for name in names if state_of(space.find("runs", name)) in ACTIVE]
    return next(iter(live + names), None)


def _actions(studio: Studio) -> dict[str, Callable]:
    """The handler of each button, which acts on the chosen run."""

    def run_of(name: str, request: gr.Request) -> Path:
        return studio.space(request).find("runs", name or "")

    @with_messages
    def stop(name: str, request: gr.Request):
        state = studio.queue.stop(run_of(name, request))
        words = {
            "queued": "It left the queue.",
            "stopping": "It was asked to stop already. After half a minute, asking again kills it.",
        }
        show_note(words.get(state, "It ends after this step, and can be resumed.")
             if state in ("queued", *ACTIVE) else f"It is {state} already.")  # fmt: skip

    @with_messages
    def save(name: str, request: gr.Request):
        studio.queue.ask(run_of(name, request), "save")
        show_note("A checkpoint will be written after this step.")

    @with_messages
    def sample(name: str, request: gr.Request):
        studio.queue.ask(run_of(name, request), "sample")
        show_note("Previews will be drawn after this step.")

    @with_messages
    def resume(name: str, request: gr.Request):
        studio.queue.resume(run_of(name, request))
        show_note("It is in the queue again.")

    return {"stop": stop, "save": save, "sample": sample, "resume": resume}


def _show(studio: Studio, space: Workspace, name: str | None, seen: str) -> list[Any]:
    """Values of `RunPanel.outputs`; plots and pictures only after a change."""
    if not name or name not in space.names("runs"):
        nothing = [gr.skip()] * 4 if seen == "none" else [gr.update(visible=False)] * 3 + [""]
        return [NO_RUNS, "", *nothing, *[gr.Button(visible=False)] * len(BUTTONS), "none"]
    folder = space.find("runs", name)
    run = read_progress(folder)
    sign = f"{name} {run.state} {run.step} {len(run.previews)} {len(run.log)} {run.last_line}"
    waiting = _waiting(studio, space)
    if sign == seen:
        return [gr.skip(), waiting, *[gr.skip()] * (4 + len(BUTTONS)), seen]
    at_rest = run.state not in (*ACTIVE, "queued")
    possible = {
        "use": at_rest and (folder / "adapter.safetensors").exists(),
        "stop": run.state in (*ACTIVE, "queued"),
        "save": run.state == "running",
        "sample": run.state == "running",
        "resume": run.state in ("stopped", "failed") and not was_refused(folder),
    }
    pictures = [(link_to(path), _caption(path)) for path in run.previews[:MAX_PREVIEWS]]
    measured = bool(run.metrics)
    return [
        _status(run),
        waiting,
        gr.LinePlot(value=loss_curves(run.metrics) if measured else None, visible=measured),
        gr.LinePlot(value=rate_curve(run.metrics) if measured else None, visible=measured),
        gr.Gallery(value=pictures, visible=bool(pictures)),
        run.log,
        *[gr.Button(visible=possible[what]) for what in BUTTONS],
        sign,
    ]


def _status(run: Progress) -> str:
    """HTML of a run's state, in words and as a bar."""
    loss = "" if run.loss is None else f"loss {run.loss:.4f}"
    facts = [f"step {run.step} of {run.total}" if run.total else "", loss, run.left()]
    kind = "trouble" if run.state == "failed" else "note"
    words = f'<p class="{kind}">{escape(run.last_line)}</p>' if run.last_line else ""
    line = f'<b>{escape(run.name)}</b><span class="state {run.state}">{run.state}</span>'
    return (
        f'<div class="run"><div class="line">{line}'
        f"<p>{escape(' · '.join(fact for fact in facts if fact))}</p></div>"
        f"{progress_bar(run.step / run.total if run.total else 0)}{words}</div>"
    )


def _caption(preview: Path) -> str:
    """`step 100` of step-000100-0.png."""
    return f"step {int(preview.stem.split('-')[1])}"


def _waiting(studio: Studio, space: Workspace) -> str:
    """HTML of the queue, without the names of other users' runs."""
    runs = studio.queue.waiting()
    if not runs:
        return ""
    own = space.folder("runs")
    items = [escape(run.name) if run.parent == own else "another user's run" for run in runs]
    return f"<b>Waiting</b><ol class='queue'>{''.join(f'<li>{item}</li>' for item in items)}</ol>"
