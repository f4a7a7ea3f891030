"""Sheets of pictures in a workspace: what is asked for, in names of the library, and drawing it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rite_diffusion.errors import StudioError
from rite_diffusion.studio import library
from rite_diffusion.studio.state import Studio
from rite_diffusion.studio.workspace import Workspace

MOST_PICTURES = 256


@dataclass(frozen=True)
class SheetOrder:
    """A sheet that is asked for; each of `adapters` is a list of names, [] for the base alone."""

    prompts: Sequence[str]
    adapters: Sequence[Sequence[str]] = ((),)
    weights: Sequence[float] = (1.0,)
    methods: Sequence[str] = ("attached",)
    seeds: Sequence[int] = (0,)
    columns: str = "seed"
    steps: int | None = None

    def check(self) -> None:
        """Raise StudioError for a sheet that is empty or too large."""
        if not self.prompts:
            raise StudioError("write a prompt first: what should the pictures show?")
        axes = (self.prompts, self.adapters, self.weights, self.methods, self.seeds)
        count = math.prod(map(len, axes))
        if not 1 <= count <= MOST_PICTURES:
            raise StudioError(
                f"that makes {count} pictures, of {MOST_PICTURES} at most: every combination of "
                "prompts, adapters, weights, methods and seeds is one."
            )


def draw_sheet(
    studio: Studio,
    space: Workspace,
    order: SheetOrder,
    progress: Callable[[int, int], None],
    tell: Callable[[str], None],
) -> Path:
    """Draw a sheet into `sheets/`; `progress` is called with pictures done and of how many.

    `tell` is called with what a user should know of the adapters, line by line.
    """
    from rite_diffusion.api.sheet import grid

    order.check()
    bases = {name: library.find(space, name).base for names in order.adapters for name in names}
    number = len(list(space.folder("sheets").glob("*.png")))
    out = space.new("sheets", f"{number:05d}", ".png")
    with studio.engine.lend(space, "", list(bases.values())) as backbone:
        grid(
            order.prompts,
            adapters=[
                library.with_weights(space, [(name, 1.0) for name in names])
                for names in order.adapters
            ],
            weights=order.weights,
            methods=order.methods,
            seeds=order.seeds,
            columns=order.columns,
            steps=order.steps,
            base=backbone,
            out=out,
            progress=progress,
            tell=tell,
        )
    return out
