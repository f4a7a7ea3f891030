"""Regions: boxes on a canvas, each with a prompt of its own and the adapters that it calls."""

from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from rite_diffusion.types import StudioError
from rite_diffusion.ui import library
from rite_diffusion.ui.page import empty_state, in_words, shown_all
from rite_diffusion.ui.studio import DEVICE, Studio
from rite_diffusion.ui.tabs import Refresh
from rite_diffusion.ui.tabs.adapters import MOST, build_chooser, chosen_with_weights
from rite_diffusion.ui.tabs.stage import forming, opening

MOST_REGIONS = 8
COLOURS = (
    "#6d5ef0", "#0e9f6e", "#f59e0b", "#e02424", "#0ea5e9", "#be185d", "#84cc16", "#64748b",
)  # fmt: skip
NO_PICTURE = empty_state(
    "Draw boxes on the canvas",
    "Drag from corner to corner, then write what each box shows. What lies outside of all boxes "
    "follows the prompt.",
)
CANVAS = '<div class="pad"><svg viewBox="0 0 100 100">${value}</svg><i class="band"></i></div>'
CANVAS_CSS = """
.pad { position: relative; width: 100%; aspect-ratio: 1; border-radius: 14px; touch-action: none;
  cursor: crosshair; background: var(--input-background-fill); overflow: hidden;
  border: 1.5px dashed var(--border-color-primary); }
.pad svg { position: absolute; inset: 0; width: 100%; height: 100%; }
.pad .band { position: absolute; display: none; border: 2px solid #6d5ef0; border-radius: 4px;
  background: rgb(109 94 240 / .15); }
"""
# Reports a box, as fractions of the canvas, once it is drawn.
CANVAS_JS = """
let start = null;
const at = (event) => {
  const frame = element.querySelector('.pad').getBoundingClientRect();
  const part = (value) => Math.min(1, Math.max(0, value));
  return [part((event.clientX - frame.left) / frame.width),
          part((event.clientY - frame.top) / frame.height)];
};
const box = (a, b) => [Math.min(a[0], b[0]), Math.min(a[1], b[1]),
                       Math.max(a[0], b[0]), Math.max(a[1], b[1])];
element.addEventListener('pointerdown', (event) => {
  if (!event.target.closest('.pad')) return;
  start = at(event);
  element.setPointerCapture(event.pointerId);
});
element.addEventListener('pointermove', (event) => {
  if (!start) return;
  const [left, top, right, bottom] = box(start, at(event));
  const style = element.querySelector('.band').style;
  style.display = 'block';
  style.left = 100 * left + '%'; style.top = 100 * top + '%';
  style.width = 100 * (right - left) + '%'; style.height = 100 * (bottom - top) + '%';
});
element.addEventListener('pointerup', (event) => {
  if (!start) return;
  const drawn = box(start, at(event));
  start = null;
  element.querySelector('.band').style.display = 'none';
  if (drawn[2] - drawn[0] > 0.05 && drawn[3] - drawn[1] > 0.05) trigger('select', {box: drawn});
});
"""
HEADERS = ["left", "top", "right", "bottom", "prompt", "negative"]


def build(studio: Studio) -> list[Refresh]:
    """Lay the tab out and connect it."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=5, min_width=320):
            prompt = gr.Textbox(
                label="Prompt of the whole picture", placeholder="on a blue background",
                max_lines=4, elem_id="region-prompt",
            )  # fmt: skip
            canvas = gr.HTML(
                "", html_template=CANVAS, css_template=CANVAS_CSS, js_on_load=CANVAS_JS,
                elem_id="canvas",
            )  # fmt: skip
            table = gr.Dataframe(
                headers=HEADERS, datatype=["number"] * 4 + ["str"] * 2, type="array", value=[],
                label="Boxes, in fractions of the sides", column_count=6, wrap=True,
                interactive=True, buttons=[], elem_id="regions",
                column_widths=["11%"] * 4 + ["34%", "22%"],
            )  # fmt: skip
            undo = gr.Button("Remove the last box", size="sm")
        with gr.Column(scale=7, min_width=320):
            chooser, refresh_adapters = build_chooser(studio)
            with gr.Row():
                seed = gr.Number(0, label="Seed", precision=0, min_width=90)
                count = gr.Slider(1, 16, value=2, step=1, label="Pictures", min_width=120)
                steps = gr.Slider(1, 100, value=25, step=1, label="Steps", min_width=120)
            with gr.Row():
                go = gr.Button("Draw", variant="primary", scale=2, elem_id="draw-regions")
                stop = gr.Button("Stop", scale=1, min_width=80)
            stage = gr.HTML(NO_PICTURE, elem_id="region-stage")
            made = gr.Gallery(
                label="Pictures", columns=2, height="auto", object_fit="contain", visible=False,
                interactive=False, buttons=["download", "fullscreen"], elem_id="region-made",
            )  # fmt: skip

    @in_words
    def add(rows: list[list[Any]], event: gr.EventData):
        corners = [round(float(value), 3) for value in event.box]
        kept = [row for row in rows if any(row)]
        if len(kept) >= MOST_REGIONS:
            raise StudioError(f"{MOST_REGIONS} boxes at most: remove one first.")
        kept.append([*corners, "", ""])
        return kept, boxes_html(kept)

    @in_words
    def draw(
        request: gr.Request, prompt: str, rows: list[list[Any]], seed: float, count: float,
        steps: float, *chosen: Any,
    ):  # fmt: skip
        space = studio.space(request)
        regions = tuple(region_texts(rows))
        adapters = library.with_weights(space, chosen_with_weights(chosen[0], chosen[1 : MOST + 1]))
        yield {stage: opening()}
        from rite_diffusion.ui.engine import Wish

        wishes = [
            Wish(prompt, seed=int(seed) + index, steps=int(steps), regions=regions)
            for index in range(int(count))
        ]
        done: list[Path] = []
        for frame in studio.engine.draw(space, wishes, adapters):
            if frame.path is not None:
                done.append(frame.path)
                gallery = gr.Gallery(value=shown_all(done), visible=True)
                yield {stage: forming(frame, len(done), len(wishes)), made: gallery}
            elif frame.image is not None:
                yield {stage: forming(frame, len(done), len(wishes))}
        yield {stage: "" if done else NO_PICTURE}

    quiet = {"show_progress": "hidden", "api_visibility": "private"}
    canvas.select(add, table, [table, canvas], **quiet)
    table.input(lambda rows: boxes_html(rows), table, canvas, **quiet)
    undo.click(lambda rows: (rows[:-1], boxes_html(rows[:-1])), table, [table, canvas], **quiet)
    event = gr.on(
        [go.click, prompt.submit],
        draw,
        [prompt, table, seed, count, steps, *chooser.inputs()],
        [stage, made],
        concurrency_id=DEVICE,
        concurrency_limit=1,
        trigger_mode="once",
        show_progress="hidden",
        api_visibility="private",
    )
    stop.click(lambda: NO_PICTURE, None, stage, cancels=[event], api_visibility="private")
    return [refresh_adapters]


def region_texts(rows: list[list[Any]]) -> list[str]:
    """The regions of the table's rows as `rite generate --region` takes them."""
    texts = []
    for number, row in enumerate((row for row in rows if any(row)), 1):
        *corners, prompt, negative = row
        if not str(prompt or "").strip():
            raise StudioError(f"box {number} has no prompt: write what it shows.")
        try:
            box = ",".join(f"{float(corner):g}" for corner in corners)
        except (TypeError, ValueError):
            raise StudioError(f"box {number}: its corners are numbers from 0 to 1.") from None
        texts.append(f"{box}: {prompt}" + (f" :: {negative}" if negative else ""))
    if not texts:
        raise StudioError("draw a box on the canvas first.")
    return texts


def boxes_html(rows: list[list[Any]]) -> str:
    """The rows' boxes as SVG, numbered and named."""
    shapes = []
    for index, row in enumerate(row for row in rows if any(row)):
        left, top, right, bottom = (100 * float(corner or 0) for corner in row[:4])
        colour, words = COLOURS[index % len(COLOURS)], escape(str(row[4] or ""))
        shapes.append(
            f'<rect x="{left:g}" y="{top:g}" width="{right - left:g}" height="{bottom - top:g}" '
            f'rx="1.5" fill="{colour}" fill-opacity=".18" stroke="{colour}" stroke-width=".6"/>'
            f'<text x="{left + 2:g}" y="{top + 6:g}" font-size="4" fill="{colour}">'
            f"{index + 1} {words}</text>"
        )
    return "".join(shapes)
