"""The open base model with its attached adapters, which draws one picture at a time."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from PIL.Image import Image

from rite_diffusion.adapters.attach import attach, detach, set_weight
from rite_diffusion.adapters.choice import Chosen, choose_adapters, notes
from rite_diffusion.backbones.protocols import Backbone
from rite_diffusion.backbones.source import load_backbone
from rite_diffusion.generation.attached import Attached, as_attached, attached_name
from rite_diffusion.generation.denoise import decode_pictures
from rite_diffusion.generation.metadata import encode_png
from rite_diffusion.generation.output import write_next
from rite_diffusion.generation.picture import estimates, resolve_boxes, resolve_request
from rite_diffusion.generation.request import Parameters, PictureRequest
from rite_diffusion.studio.workspace import Workspace

PAUSE = 0.3  # seconds between previews


@dataclass(frozen=True)
class Frame:
    """A picture after a denoising step; `path` is set at the last step, `image` now and then."""

    step: int
    parameters: Parameters
    image: Image | None = None
    path: Path | None = None


class Engine:
    """Draws pictures; keeps the last base open with its adapters, for the next request."""

    def __init__(self):
        self._lock = threading.Lock()
        self._turn = 0
        self._backbone: Backbone | None = None
        self._base = ""
        self._attached: list[tuple[Path, int]] = []  # path and time of change

    def open_pocket(self) -> None:
        """Open the pocket base, so that the first picture starts at once."""
        with self._lock:
            self._open("pocket")

    def _open(self, base: str) -> Backbone:
        if self._backbone is None or self._base != base:
            self._backbone, self._attached = None, []  # frees memory for the next
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
    def exclusive_base(
        self, space: Workspace, base: str, recorded: Sequence[str]
    ) -> Iterator[Backbone]:
        """The base model without adapters, until the block ends; drawings wait meanwhile.

        `base` is as the user wrote it; empty, it is the first of `recorded`, else pocket.
        """
        with self._lock:
            self._turn += 1
            backbone = self._open(_named(space, base, recorded))
            self._detach(backbone)
            yield backbone

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Let drawings wait until the block ends."""
        with self._lock:
            self._turn += 1
            yield

    def draw(
        self,
        space: Workspace,
        requests: Sequence[PictureRequest],
        on_note: Callable[[str], None],
        adapters: Sequence[str] = (),
        base: str = "",
    ) -> Iterator[Frame]:
        """A frame for each step of each picture; the last step writes a PNG to `outputs/`.

        `adapters` are `FILE:WEIGHT`; `base` is as the user wrote it, by default the adapters' own.
        `on_note` is called with each line about the adapters that the user should read. Ends early
        once another drawing has begun: one works at a time, and a closed page may leave its own.
        """
        with self._lock:
            self._turn += 1
            turn = self._turn
            backbone, chosen = self._prepare(space, base, adapters)
        for line in notes(chosen):
            on_note(line)
        records = [each.record() for each in chosen]
        attached = as_attached(chosen)
        for parameters in [resolve_request(backbone, request, records) for request in requests]:
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
        """The next frame; None at the end, or once a later drawing has begun."""
        with self._lock:
            return next(frames, None) if turn == self._turn else None


def _named(space: Workspace, base: str, recorded: Sequence[str]) -> str:
    """The base that the user named, else the first that adapters record, else pocket."""
    return space.base(base) or space.base(next(filter(None, recorded), "")) or "pocket"


def _frames(
    backbone: Backbone, parameters: Parameters, attached: list[Attached], folder: Path
) -> Iterator[Frame]:
    """A frame after every step, with a picture every PAUSE seconds and at the end."""
    shown = 0.0
    parameters = resolve_boxes(backbone, parameters, attached)
    for step, latents in enumerate(estimates(backbone, parameters, attached), 1):
        frame = Frame(step, parameters)
        if step == parameters.steps:
            [image] = decode_pictures(backbone, latents)
            path = write_next(folder, encode_png(image, parameters))
            yield replace(frame, image=image, path=path)
        elif time.monotonic() - shown < PAUSE:
            yield frame
        else:
            [image] = decode_pictures(backbone, latents)
            shown = time.monotonic()
            yield replace(frame, image=image)
