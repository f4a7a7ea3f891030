"""Regions: boxes on a canvas, each with a prompt and an adapter. A part of the Generate tab."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import gradio as gr

from rite_diffusion.errors import StudioError
from rite_diffusion.studio.boxes import (
    BY_WORDS,
    MAX_BOXES,
    NONE,
    Box,
    canvas_html,
    checked_corners,
    colour_of,
    read_corners,
    side_by_side,
)
from rite_diffusion.studio.page import with_messages

NEXT = (0.25, 0.25, 0.75, 0.75)  # corners of a box that a button adds
CANVAS_CSS = """
.pad { position: relative; width: 100%; aspect-ratio: var(--ratio, 1); border-radius: 14px;
  touch-action: none; user-select: none; cursor: crosshair; overflow: hidden;
  background: var(--input-background-fill); border: 1.5px dashed var(--border-color-primary); }
.pad > span { position: absolute; inset: 0; display: grid; place-items: center;
  color: var(--body-text-color-subdued); }
.band, .box { position: absolute; border-radius: 8px; box-sizing: border-box; }
.band { display: none; border: 2px solid #6d5ef0; background: rgb(109 94 240 / .15); }
.box { border: 2px solid var(--colour); cursor: move; overflow: hidden;
  background: color-mix(in srgb, var(--colour) 16%, transparent); }
.box.picked { box-shadow: 0 0 0 2px color-mix(in srgb, var(--colour) 45%, transparent);
  background: color-mix(in srgb, var(--colour) 28%, transparent); }
.box p { margin: 0; padding: .35rem .5rem; font-size: .85rem; line-height: 1.35;
  color: var(--body-text-color); pointer-events: none; overflow-wrap: anywhere; }
.box b { display: inline-block; min-width: 1.35em; margin-right: .4em; border-radius: 99px;
  background: var(--colour); color: white; text-align: center; font-size: .78rem; }
.box small { display: block; }
.box:focus-visible { outline: 3px solid var(--body-text-color); outline-offset: -3px; }
.grip { position: absolute; right: 0; bottom: 0; width: 22px; height: 22px; cursor: nwse-resize;
  background: linear-gradient(135deg, transparent 55%, var(--colour) 55%); }
"""
# A drag on the empty canvas draws a box, one on a box moves it, one on its corner resizes it; a
# click selects. Arrow keys move a box with the focus, or resize it with Shift, and Enter goes to
# its prompt; the server's answer replaces the box, so the focus is given back. The server gets the
# box's index, -1 for a new one, and its corners as fractions.
CANVAS_JS = """
let drag = null;
const inside = (value) => Math.min(1, Math.max(0, value));
const at = (event) => {
  const frame = element.querySelector('.pad').getBoundingClientRect();
  return [inside((event.clientX - frame.left) / frame.width),
          inside((event.clientY - frame.top) / frame.height)];
};
const dragged = ([x, y]) => {
  const [left, top, right, bottom] = drag.box;
  if (drag.index < 0)
    return [Math.min(left, x), Math.min(top, y), Math.max(left, x), Math.max(top, y)];
  if (drag.grip) return [left, top, Math.max(left + .06, x), Math.max(top + .06, y)];
  const across = Math.min(1 - right, Math.max(-left, x - drag.start[0]));
  const down = Math.min(1 - bottom, Math.max(-top, y - drag.start[1]));
  return [left + across, top + down, right + across, bottom + down];
};
element.addEventListener('pointerdown', (event) => {
  if (!event.target.closest('.pad')) return;
  const node = event.target.closest('.box'), start = at(event);
  const box = node ? node.dataset.box.split(',').map(Number) : [...start, ...start];
  drag = { start, box, now: box, index: node ? Number(node.dataset.index) : -1,
           grip: event.target.matches('.grip'), node: node || element.querySelector('.band') };
  element.setPointerCapture(event.pointerId);
});
element.addEventListener('pointermove', (event) => {
  if (!drag) return;
  const [left, top, right, bottom] = drag.now = dragged(at(event));
  Object.assign(drag.node.style, { display: 'block', left: 100 * left + '%', top: 100 * top + '%',
    width: 100 * (right - left) + '%', height: 100 * (bottom - top) + '%' });
});
element.addEventListener('pointerup', () => {
  if (!drag) return;
  const { index, now, node } = drag;
  drag = null;
  if (index < 0) node.style.display = 'none';
  if (index >= 0 || (now[2] - now[0] >= .05 && now[3] - now[1] >= .05))
    trigger('select', { index, box: now });
});
const step = .02, least = .06;
const arrows = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step],
                 ArrowDown: [0, step] };
let focused = -1, sending = 0;
const writePrompt = (tries) => {
  const field = document.querySelector('#box-prompt textarea');
  if (field && field.checkVisibility()) field.focus();
  else if (tries) setTimeout(writePrompt, 50, tries - 1);
};
element.addEventListener('keydown', (event) => {
  const node = event.target.closest('.box'), moved = arrows[event.key];
  if (!node || !(moved || event.key === 'Enter' || event.key === ' ')) return;
  event.preventDefault();
  const index = Number(node.dataset.index);
  let [left, top, right, bottom] = node.dataset.box.split(',').map(Number);
  if (moved && event.shiftKey) {
    right = Math.min(1, Math.max(left + least, right + moved[0]));
    bottom = Math.min(1, Math.max(top + least, bottom + moved[1]));
  } else if (moved) {
    const across = Math.min(1 - right, Math.max(-left, moved[0]));
    const down = Math.min(1 - bottom, Math.max(-top, moved[1]));
    [left, top, right, bottom] = [left + across, top + down, right + across, bottom + down];
  }
  const box = [left, top, right, bottom];
  node.dataset.box = box.join(',');
  Object.assign(node.style, { left: 100 * left + '%', top: 100 * top + '%',
    width: 100 * (right - left) + '%', height: 100 * (bottom - top) + '%' });
  focused = moved ? index : -1;
  clearTimeout(sending);
  sending = setTimeout(() => trigger('select', { index, box }), moved ? 250 : 0);
  if (!moved) setTimeout(writePrompt, 300, 60);
});
element.addEventListener('focusin', (event) => {
  const node = event.target.closest('.box');
  focused = node ? Number(node.dataset.index) : -1;
});
new MutationObserver(() => {
  if (focused < 0 || document.activeElement !== document.body) return;
  element.querySelector(`.box[data-index="${focused}"]`)?.focus();
}).observe(element, { childList: true, subtree: true });
"""
RATIO_JS = """(width, height) => {
  const ratio = Number(width) > 0 && Number(height) > 0 ? width / height : 1;
  document.querySelector('#canvas').style.setProperty('--ratio', ratio);
}"""


LABEL = "Regions: parts of the picture with prompts of their own"


@dataclass(frozen=True)
class RegionPanel:
    """The canvas, and the fields of the selected box."""

    accordion: gr.Accordion
    boxes: gr.State  # list[Box]
    picked: (
        gr.Number
    )  # index of the selected box or -1; a component, so that it is sent with the fields
    canvas: gr.HTML
    editor: gr.Group
    title: gr.HTML
    prompt: gr.Textbox
    adapter: gr.Dropdown
    negative: gr.Textbox
    corners: gr.Textbox

    def inputs(self) -> list[Any]:
        """The components whose values `edited` takes."""
        return [self.boxes, self.picked, self.prompt, self.adapter, self.negative]

    def outputs(self) -> list[Any]:
        """The components that `panel_values` has values for."""
        return [
            self.accordion, self.boxes, self.picked, self.canvas, self.editor, self.title,
            self.prompt, self.adapter, self.negative, self.corners,
        ]  # fmt: skip


def edited(
    boxes: Sequence[Box], picked: float, prompt: str, adapter: str, negative: str
) -> list[Box]:
    """The boxes, with the fields' values in the selected one."""
    return [
        replace(box, prompt=prompt, adapter=adapter, negative=negative) if index == picked else box
        for index, box in enumerate(boxes)
    ]


def panel_values(names: Sequence[str], boxes: list[Box], picked: int) -> list[Any]:
    """Values of `RegionPanel.outputs`; `names` are the adapters that a box may have."""
    canvas = canvas_html(boxes, picked)
    if not boxes:
        accordion, editor = gr.Accordion(label=LABEL), gr.Group(visible=False)
        return [accordion, [], -1, canvas, editor, "", "", box_adapters(names, BY_WORDS), "", ""]
    box = boxes[picked]
    accordion = gr.Accordion(label=f"Regions: {_count(boxes)}", open=True)
    title = f'<b class="box-title" style="--colour:{colour_of(picked)}"><i></i>Box {picked + 1}</b>'
    corners = ", ".join(f"{side:g}" for side in box.corners)
    return [
        accordion, boxes, picked, canvas, gr.Group(visible=True), title, box.prompt,
        box_adapters(names, box.adapter), box.negative, corners,
    ]  # fmt: skip


def _count(boxes: Sequence[Box]) -> str:
    return "one box" if len(boxes) == 1 else f"{len(boxes)} boxes"


def build_regions(names: gr.Dropdown) -> RegionPanel:
    """Make the canvas and connect its events; `names` lists the adapters that a box may have."""
    with gr.Accordion(LABEL, open=False, elem_id="regions") as accordion:
        panel, buttons = _lay_out(accordion)
    quiet = {
        "show_progress": "hidden", "api_visibility": "private",
        "concurrency_id": "canvas", "concurrency_limit": 1,
    }  # fmt: skip

    @with_messages
    def draw(event: gr.EventData, names: list[str], *fields: Any):
        boxes, index = edited(*fields), int(event.index)
        if index >= len(boxes):  # the box was removed meanwhile
            return panel_values(names, boxes, len(boxes) - 1)
        if index >= 0:
            boxes[index] = replace(boxes[index], **checked_corners(event.box))
            return panel_values(names, boxes, index)
        return panel_values(names, *_with_box(boxes, event.box))

    @with_messages
    def add(names: list[str], *fields: Any):
        return panel_values(names, *_with_box(edited(*fields), NEXT))

    def columns(names: list[str], *fields: Any):
        boxes = side_by_side(edited(*fields))
        return panel_values(names, boxes, min(max(int(fields[1]), 0), len(boxes) - 1))

    def remove(names: list[str], *fields: Any):
        boxes = [box for index, box in enumerate(fields[0]) if index != fields[1]]
        return panel_values(names, boxes, len(boxes) - 1)

    @with_messages
    def move(corners: str, names: list[str], *fields: Any):
        boxes, picked = edited(*fields), int(fields[1])
        boxes[picked] = replace(boxes[picked], **read_corners(corners))
        return panel_values(names, boxes, picked)

    def keep(*fields: Any):
        boxes = edited(*fields)
        return boxes, canvas_html(boxes, int(fields[1]))

    inputs = [names, *panel.inputs()]
    panel.canvas.select(draw, inputs, panel.outputs(), **quiet)
    buttons["add"].click(add, inputs, panel.outputs(), **quiet)
    buttons["columns"].click(columns, inputs, panel.outputs(), **quiet)
    buttons["remove"].click(remove, inputs, panel.outputs(), **quiet)
    panel.corners.submit(move, [panel.corners, *inputs], panel.outputs(), **quiet)
    gr.on(
        [panel.prompt.input, panel.adapter.input, panel.negative.input],
        keep, panel.inputs(), [panel.boxes, panel.canvas], trigger_mode="always_last", **quiet,
    )  # fmt: skip
    return panel


def _with_box(boxes: list[Box], corners: Sequence[float]) -> tuple[list[Box], int]:
    """The boxes with a new one, and its index."""
    if len(boxes) >= MAX_BOXES:
        raise StudioError(f"{MAX_BOXES} boxes at most: remove one first.")
    return [*boxes, Box(**checked_corners(corners))], len(boxes)


def _lay_out(accordion: gr.Accordion) -> tuple[RegionPanel, dict[str, gr.Button]]:
    canvas = gr.HTML(
        canvas_html([], -1), css_template=CANVAS_CSS, js_on_load=CANVAS_JS, elem_id="canvas"
    )
    with gr.Row():
        buttons = {
            "add": gr.Button("Add a box", size="sm", min_width=90, elem_id="box-add"),
            "columns": gr.Button("Side by side", size="sm", min_width=90, elem_id="columns"),
        }
    with gr.Group(visible=False) as editor:
        title = gr.HTML("", padding=True)
        prompt = gr.Textbox(
            value="",
            label="What this box shows",
            placeholder="a <robot> on the left",
            info="With the place: what has none is drawn in the middle of the picture.",
            max_lines=4,
            elem_id="box-prompt",
        )
        adapter = gr.Dropdown([BY_WORDS, NONE], value=BY_WORDS, label="Adapter in this box",
                              elem_id="box-adapter")  # fmt: skip
        with gr.Row():
            negative = gr.Textbox("", label="Negative prompt", min_width=120)
            corners = gr.Textbox("", label="Left, top, right, bottom", min_width=120,
                                 elem_id="box-corners")  # fmt: skip
        buttons["remove"] = gr.Button("Remove this box", size="sm", elem_id="box-remove")
    picked = gr.Number(-1, visible="hidden")
    boxes = gr.State([])
    panel = RegionPanel(
        accordion, boxes, picked, canvas, editor, title, prompt, adapter, negative, corners
    )
    return panel, buttons


def box_adapters(names: Sequence[str], chosen: str) -> gr.Dropdown:
    """The list of the adapters that a box may have."""
    known = [BY_WORDS, NONE, *names]
    return gr.Dropdown(choices=known, value=chosen if chosen in known else BY_WORDS)
