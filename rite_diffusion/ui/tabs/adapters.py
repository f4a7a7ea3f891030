"""Choosing adapters with a weight each, and the words that call them: used by several tabs."""

from collections.abc import Sequence
from dataclasses import dataclass

import gradio as gr

from rite_diffusion.ui import library
from rite_diffusion.ui.page import in_words
from rite_diffusion.ui.studio import Studio
from rite_diffusion.ui.tabs import Refresh

MOST = 6  # adapters at once


@dataclass(frozen=True)
class Chooser:
    """The adapters' list, their weights' sliders, and the list that the sliders are for."""

    names: gr.Dropdown
    weights: list[gr.Slider]
    before: gr.State

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
    before = gr.State([])
    chooser = Chooser(names, weights, before)

    names.change(
        sliders,
        [before, *chooser.inputs()],
        [before, *weights],
        show_progress="hidden",
        api_visibility="private",
    )

    @in_words
    def refresh(chosen: list[str], request: gr.Request):
        known = [card.name for card in library.cards(studio.space(request))]
        return gr.Dropdown(choices=known, value=[name for name in chosen if name in known])

    return chooser, Refresh(refresh, [names], [names])


def sliders(before: list[str], names: list[str], *weights: float):
    """The sliders of the chosen adapters; one that was chosen already keeps its weight."""
    kept = dict(zip(before, weights, strict=False))
    fresh = [
        gr.Slider(visible=True, label=f"Weight of {name}", value=kept.get(name, 1.0))
        for name in names
    ]
    return [names, *fresh, *[gr.Slider(visible=False, value=1.0)] * (MOST - len(names))]


def chosen_with_weights(names: Sequence[str], weights: Sequence[float]) -> list[tuple[str, float]]:
    """Name and weight of each chosen adapter."""
    return list(zip(names, weights, strict=False))
