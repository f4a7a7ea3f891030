"""The studio's tabs, one module each; its `build` makes the tab and returns a `BuiltTab`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import gradio as gr
from gradio.components import Component

from rite_diffusion.studio.library import Card
from rite_diffusion.studio.workspace import Workspace


@dataclass(frozen=True)
class Refresh:
    """A handler that updates components when their tab is shown."""

    handler: Callable
    outputs: Sequence[Component]
    inputs: Sequence[Component] = ()


@dataclass(frozen=True)
class UseButton:
    """A button that opens the Generate tab with the adapter that the component `name` holds."""

    button: gr.Button
    name: Component
    find: Callable[[Workspace, str], Card]


@dataclass(frozen=True)
class BuiltTab:
    """What the page connects of a tab."""

    refreshes: Sequence[Refresh]
    use: UseButton | None = None
