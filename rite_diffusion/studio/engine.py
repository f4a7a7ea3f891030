"""The base model that is open, with the adapters that are in it, for one picture at a time."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL.Image import Image

from rite_diffusion.adapters.attach import attach, detach, set_weight
from rite_diffusion.adapters.choice import Chosen, choose_adapters, notes
from rite_diffusion.backbones.protocols import Backbone
from rite_diffusion.backbones.source import load_backbone
from rite_diffusion.generation.attached import Attached, as_attached, attached_name
from rite_diffusion.generation.denoise import pictures
from rite_diffusion.generation.metadata import png_of
from rite_diffusion.generation.output import write_next
from rite_diffusion.generation.picture import estimates, resolved, with_boxes
from rite_diffusion.generation.request import Parameters, PictureRequest
from rite_diffusion.studio.workspace import Workspace

PAUSE = 0.3  # seconds between previews


@dataclass(frozen=True)
class Frame:
    """What is known of a picture after a step; `path` comes with the last."""

    step: int
    parameters: Parameters
    image: Image | None = None
    path: Path | None = None


def devices() -> list[str]:
    """The devices that can train, each by the number that CUDA knows it by, or `cpu`."""
    return [str(index) for index in range(torch.cuda.device_count())] or ["cpu"]


class Engine:
    """Keeps the last base open, and its adapters in it, until something else is asked for."""

    def __init__(self):
        self._lock = threading.Lock()
        self._turn = 0
        self._backbone: Backbone | None = None
        self._base = ""
        self._attached: list[tuple[Path, int]] = []  # path and time of change

    def warm_up(self) -> None:
        """Open the pocket base, so that the first picture does not wait for it."""
        with self._lock:
            self._open("pocket")

    def _open(self, base: str) -> Backbone:
        if self._backbone is None or self._base != base:
            self._backbone, self._attached = None, []  # room for the next
            self._backbone, self._base = load_backbone(base), base
        return self._backbone

    def _attach(self, backbone: Backbone, chosen: list[Chosen]) -> None:
        wanted = [(each.path, each.path.stat().st_mtime_ns) for each in chosen]
        if wanted != self._attached:
            self._detach(backbone)
            for index, each in enumerate(chosen):
                attach(backbone, each.adapter, attached_name(index), each.weight)
                self._attached = wanted[: index + 1]
        for index, each in enumerate(chosen):
            set_weight(backbone, attached_name(index), each.weight)

    def _detach(self, backbone: Backbone) -> None:
        for index in range(len(self._attached)):
            detach(backbone, attached_name(index))
        self._attached = []

    @contextmanager
    def lend(self, space: Workspace, base: str, recorded: Sequence[str]) -> Iterator[Backbone]:
        """The base model alone, for a recipe, until the block ends; drawings wait that long.

        The base is what a user calls it, by default the first that the adapters were made for.
        """
        with self._lock:
            self._turn += 1
            backbone = self._open(_named(space, base, recorded))
            self._detach(backbone)
            yield backbone

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Nothing is drawn until the block ends."""
        with self._lock:
            self._turn += 1
            yield

    def draw(
        self,
        space: Workspace,
        requests: Sequence[PictureRequest],
        tell: Callable[[str], None],
        adapters: Sequence[str] = (),
        base: str = "",
    ) -> Iterator[Frame]:
        """Each step of each picture, with adapters `FILE:WEIGHT`; the last writes a PNG.

        The base is what a user calls it, by default the one that the adapters were made for. `tell`
        is called with what a user should know of the adapters, line by line.

        Ends early where another drawing has begun: one works at a time, and a page that was closed
        may have left its own unfinished.
        """
        with self._lock:
            self._turn += 1
            turn = self._turn
            backbone, chosen = self._prepare(space, base, adapters)
        for line in notes(chosen):
            tell(line)
        records = [each.record() for each in chosen]
        attached = as_attached(chosen)
        for parameters in [resolved(backbone, request, records) for request in requests]:
            frames = _frames(backbone, parameters, attached, space.folder("outputs"))
            while frame := self._next(frames, turn):
                yield frame

    def _prepare(
        self, space: Workspace, base: str, adapters: Sequence[str]
    ) -> tuple[Backbone, list[Chosen]]:
        chosen = choose_adapters(adapters)
        recorded = [each.adapter.info.base for each in chosen]
        backbone = self._open(_named(space, base, recorded))
        self._attach(backbone, chosen)
        return backbone, chosen

    def _next(self, frames: Iterator[Frame], turn: int) -> Frame | None:
        """The next frame of the drawing whose turn it is, None at its end."""
        with self._lock:
            return next(frames, None) if turn == self._turn else None


def _named(space: Workspace, base: str, recorded: Sequence[str]) -> str:
    """The base that is asked for, else the first that is recorded, else pocket."""
    return space.base(base) or space.base(next(filter(None, recorded), "")) or "pocket"


def _frames(
    backbone: Backbone, parameters: Parameters, attached: list[Attached], folder: Path
) -> Iterator[Frame]:
    """A frame after every step; those that come fast have no picture."""
    shown = 0.0
    parameters = with_boxes(backbone, parameters, attached)
    for step, latents in enumerate(estimates(backbone, parameters, attached), 1):
        frame = Frame(step, parameters)
        if step == parameters.steps:
            [image] = pictures(backbone, latents)
            path = write_next(folder, png_of(image, parameters))
            yield replace(frame, image=image, path=path)
        elif time.monotonic() - shown < PAUSE:
            yield frame
        else:
            [image] = pictures(backbone, latents)
            shown = time.monotonic()
            yield replace(frame, image=image)
