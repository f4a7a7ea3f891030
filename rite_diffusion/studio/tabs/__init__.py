"""The studio's tabs, one module each: `build` lays it out and returns what the page connects."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import gradio as gr
from gradio.components import Component

from rite_diffusion.studio.library import Card
from rite_diffusion.studio.workspace import Workspace


@dataclass(frozen=True)
class Refresh:
    """What brings a tab up to date when it is shown: a handler and what it fills."""

    handler: Callable
    outputs: Sequence[Component]
    inputs: Sequence[Component] = ()


@dataclass(frozen=True)
class Use:
    """A button that goes on to the Generate tab with the adapter that a component names."""

    button: gr.Button
    name: Component
    find: Callable[[Workspace, str], Card]


@dataclass(frozen=True)
class Built:
    """What the page must know of a tab."""

    refreshes: Sequence[Refresh]
    use: Use | None = None
