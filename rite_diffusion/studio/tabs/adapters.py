"""A list to choose adapters from, with a slider for each one's weight; several tabs use it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from rite_diffusion.studio import library
from rite_diffusion.studio.page import with_messages
from rite_diffusion.studio.state import Studio
from rite_diffusion.studio.tabs import Refresh

MAX_ADAPTERS = 6  # adapters at once


@dataclass(frozen=True)
class Chooser:
    """The list of adapters, the chosen names, the sliders, and the names that these belong to.

    Handlers of a changed choice must be bound to `chosen`, and whoever sets `names` must set
    `chosen` too: a multiselect Dropdown fires `change` at each click, and when it is set by code.
    """

    names: gr.Dropdown
    chosen: gr.State
    weights: list[gr.Slider]
    weighted: gr.State

    def inputs(self) -> list:
        """Inputs of a handler: the names, then every slider."""
        return [self.names, *self.weights]


def build_chooser(studio: Studio) -> tuple[Chooser, Refresh]:
    """Make the list and its sliders."""
    names = gr.Dropdown(
        [],
        multiselect=True,
        max_choices=MAX_ADAPTERS,
        label="Adapters",
        info="trained or imported ones",
    )
    weights = [
        gr.Slider(-1, 2, value=1, step=0.05, visible=False, label=f"Weight {index + 1}")
        for index in range(MAX_ADAPTERS)
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
    """An update of a list's choices; its value is set only where a chosen name no longer exists.

    Setting the value that the request carried would undo a choice made in the meantime.
    """
    present = [name for name in chosen if name in known]
    if present == chosen:
        return gr.update(choices=known)
    return gr.update(choices=known, value=present)


def sliders(weighted: list[str], names: list[str], *weights: float):
    """The sliders of the chosen adapters; those that had one before keep their weights."""
    kept = dict(zip(weighted, weights, strict=False))
    fresh = [
        gr.Slider(visible=True, label=f"Weight of {name}", value=kept.get(name, 1.0))
        for name in names
    ]
    return [names, *fresh, *[gr.Slider(visible=False, value=1.0)] * (MAX_ADAPTERS - len(names))]


def chosen_with_weights(names: Sequence[str], weights: Sequence[float]) -> list[tuple[str, float]]:
    """Name and weight of each chosen adapter."""
    return list(zip(names, weights, strict=False))
