"""Sheets of pictures in a workspace: the request, in names of the library, and its drawing."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rite_diffusion.errors import StudioError
from rite_diffusion.studio import library
from rite_diffusion.studio.checks import check_prompt
from rite_diffusion.studio.state import Studio
from rite_diffusion.studio.workspace import Workspace

MAX_PICTURES = 256


@dataclass(frozen=True)
class SheetRequest:
    """A requested sheet; each of `adapters` is a list of names, [] for the base alone."""

    prompts: Sequence[str]
    adapters: Sequence[Sequence[str]] = ((),)
    weights: Sequence[float] = (1.0,)
    methods: Sequence[str] = ("attached",)
    seeds: Sequence[int] = (0,)
    columns: str = "seed"
    steps: int | None = None

    def check(self) -> None:
        """StudioError for a sheet that is empty or too large."""
        for prompt in self.prompts or [""]:
            check_prompt(prompt)
        axes = (self.prompts, self.adapters, self.weights, self.methods, self.seeds)
        count = math.prod(map(len, axes))
        if not 1 <= count <= MAX_PICTURES:
            raise StudioError(
                f"that makes {count} pictures, of {MAX_PICTURES} at most: every combination of "
                "prompts, adapters, weights, methods and seeds is one."
            )


def draw_sheet(
    studio: Studio,
    space: Workspace,
    sheet: SheetRequest,
    progress: Callable[[int, int], None],
    on_note: Callable[[str], None],
) -> Path:
    """Draw a sheet into `sheets/` and return its path.

    `progress` is called with the pictures done and their number, `on_note` with each line about
    the adapters that the user should read.
    """
    from rite_diffusion.api.sheet import grid

    sheet.check()
    bases = {name: library.find(space, name).base for names in sheet.adapters for name in names}
    number = len(list(space.folder("sheets").glob("*.png")))
    out = space.new("sheets", f"{number:05d}", ".png")
    with studio.engine.exclusive_base(space, "", list(bases.values())) as backbone:
        grid(
            sheet.prompts,
            adapters=[
                library.with_weights(space, [(name, 1.0) for name in names])
                for names in sheet.adapters
            ],
            weights=sheet.weights,
            methods=sheet.methods,
            seeds=sheet.seeds,
            columns=sheet.columns,
            steps=sheet.steps,
            base=backbone,
            out=out,
            progress=progress,
            on_note=on_note,
        )
    return out
