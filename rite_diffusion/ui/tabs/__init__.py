"""The studio's tabs, one module each: `build` lays it out and returns what refreshes it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gradio.components import Component


@dataclass(frozen=True)
class Refresh:
    """What brings a tab up to date when it is shown: a handler and what it fills."""

    handler: Callable
    outputs: Sequence[Component]
    inputs: Sequence[Component] = ()
