"""Choosing adapters with a weight each, and the words that call them: used by several tabs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from rite_diffusion.studio import library
from rite_diffusion.studio.page import with_messages
from rite_diffusion.studio.state import Studio
from rite_diffusion.studio.tabs import Refresh

MOST = 6  # adapters at once


@dataclass(frozen=True)
class Chooser:
    """The adapters' list, what it says, their weights' sliders, and the list that those are for.

    What hangs on the choice listens to `chosen`: a list of several tells of a change at every
    touch of the page, also of what it tells itself. Whoever fills `names` fills `chosen` as well.
    """

    names: gr.Dropdown
    chosen: gr.State
    weights: list[gr.Slider]
    weighted: gr.State

    def inputs(self) -> list:
        """What a handler gets: the names, then every slider."""
        return [self.names, *self.weights]


def build_chooser(studio: Studio) -> tuple[Chooser, Refresh]:
    """Lay the list and its sliders out."""
    names = gr.Dropdown(
        [], multiselect=True, max_choices=MOST, label="Adapters", info="trained or imported ones"
    )
    weights = [
        gr.Slider(-1, 2, value=1, step=0.05, visible=False, label=f"Weight {index + 1}")
        for index in range(MOST)
    ]
    chosen, weighted = gr.State([]), gr.State([])
    chooser = Chooser(names, chosen, weights, weighted)
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    names.input(list, names, chosen, **quiet)
    chosen.change(sliders, [weighted, *chooser.inputs()], [weighted, *weights], **quiet)

    @with_messages
    def refresh(names: list[str], request: gr.Request):
        known = [card.name for card in library.cards(studio.space(request))]
        present = [name for name in names if name in known]
        return offered(known, names), gr.skip() if present == names else present

    return chooser, Refresh(refresh, [names, chosen], [names])


def offered(known: list[str], chosen: list[str]) -> dict[str, Any]:
    """What gives a list new choices; what is chosen changes only where a name is gone.

    A refresh that answers what it was asked with would undo a choice made in the meantime.
    """
    present = [name for name in chosen if name in known]
    if present == chosen:
        return gr.update(choices=known)
    return gr.update(choices=known, value=present)


def sliders(weighted: list[str], names: list[str], *weights: float):
    """The sliders of the chosen adapters; one that had a slider already keeps its weight."""
    kept = dict(zip(weighted, weights, strict=False))
    fresh = [
        gr.Slider(visible=True, label=f"Weight of {name}", value=kept.get(name, 1.0))
        for name in names
    ]
    return [names, *fresh, *[gr.Slider(visible=False, value=1.0)] * (MOST - len(names))]


def chosen_with_weights(names: Sequence[str], weights: Sequence[float]) -> list[tuple[str, float]]:
    """Name and weight of each chosen adapter."""
    return list(zip(names, weights, strict=False))
