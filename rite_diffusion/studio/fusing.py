"""Fusions in a workspace: statistics that are kept beside the adapters, forecasts, and drafts."""

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rite_diffusion.errors import FusionError, StudioError
from rite_diffusion.studio import library
from rite_diffusion.studio.library import Card
from rite_diffusion.studio.state import Studio
from rite_diffusion.studio.workspace import Workspace, name_from

if TYPE_CHECKING:
    from rite_diffusion.api.fuse import FusionPreview
    from rite_diffusion.fusion.merge import Merged

ProgressCallback = Callable[[str, float], None]  # text, and the share that is done
OLD = 24 * 3600  # seconds after which a draft that nobody saved is thrown away
BACKGROUND = "on a blue background"


@dataclass(frozen=True)
class Order:
    """A fusion that is asked for: adapters with their weights, and how."""

    cards: tuple[Card, ...]
    weights: tuple[float, ...]
    method: str
    rank: int | None = None
    allow_loss: bool = False  # write it even where the rank cuts more than 1 % off

    def files(self) -> list[str]:
        """`FILE:WEIGHT` of each adapter."""
        pairs = zip(self.cards, self.weights, strict=True)
        return [f"{card.path}:{weight:g}" for card, weight in pairs]

    def title(self) -> str:
        """A name for the result."""
        return name_from(" + ".join(card.name for card in self.cards), "fused")

    def settings(self) -> dict[str, Any]:
        """Settings of the method that differ from the usual."""
        return {} if self.rank is None else {"rank": self.rank}


def order_of(
    space: Workspace,
    chosen: Sequence[tuple[str, float]],
    method: str,
    rank: int | None,
    allow_loss: bool = False,
) -> Order:
    """The fusion of adapters by their names; StudioError says what is missing."""
    from rite_diffusion.fusion.merge import method_named

    if len(chosen) < 2:
        raise StudioError("choose two adapters or more: one alone is fused already.")
    method_named(method)
    cards = tuple(library.find(space, name) for name, _ in chosen)
    return Order(cards, tuple(weight for _, weight in chosen), method, rank, allow_loss)


def preview_fusion(
    studio: Studio, space: Workspace, order: Order, progress: ProgressCallback
) -> "FusionPreview":
    """The conflicts of the adapters, and what the method would make of them."""
    from rite_diffusion.api import fuse as merging

    _measure(studio, space, order, progress)
    progress("Weighing the layers…", 1.0)
    return merging.preview_fusion(order.files(), method=order.method, **order.settings())


def fuse(
    studio: Studio, space: Workspace, order: Order, out: Path, progress: ProgressCallback
) -> "FusionPreview | Merged":
    """Write the fused adapter, which is returned; with its report where all are measured."""
    from rite_diffusion.adapters import save_adapter
    from rite_diffusion.api import fuse as merging
    from rite_diffusion.fusion import FUSIONS
    from rite_diffusion.fusion.settings import checked_settings

    if FUSIONS[order.method].statistics:
        _measure(studio, space, order, progress)
    progress("Fusing the layers…", 1.0)
    measured = all(_has_sketch(card.path) for card in order.cards)
    combine = merging.preview_fusion if measured else merging.fused_adapter
    made = combine(order.files(), method=order.method, **order.settings())
    merging.check_loss(made.loss, checked_settings(order.settings()), order.allow_loss)
    save_adapter(out, made.adapter)
    return made


def _measure(studio: Studio, space: Workspace, order: Order, progress: ProgressCallback) -> None:
    """See that a sketch of its present content lies beside each adapter."""
    from rite_diffusion.api import sketch as sketching

    missing = [card for card in order.cards if not _has_sketch(card.path)]
    for card in missing:
        if not card.triggers():
            raise StudioError(
                f"'{card.name}' does not say which word calls its concept, so it cannot be "
                "measured: choose a method without statistics, such as concat."
            )
    if not missing:
        return
    with studio.engine.lend(space, "", [card.base for card in order.cards]) as backbone:
        for index, card in enumerate(missing):
            count = partial(_count_pictures, progress, card.name, index, len(missing))
            sketching.sketch(card.path, base=backbone, overwrite=True, progress=count)


def _count_pictures(
    progress: ProgressCallback, name: str, index: int, concepts: int, done: int, total: int
) -> None:
    """Tell how far the statistics of concept `index` of several are: `done` of `total` pictures."""
    words = f"What flows through the layers for {name}: picture {done} of {total}"
    progress(words, (index + done / total) / concepts)


def _has_sketch(file: Path) -> bool:
    from rite_diffusion.adapters import load_adapter
    from rite_diffusion.fusion.members import digest_of
    from rite_diffusion.fusion.sketch import load_sketch, sketch_path

    path = sketch_path(file)
    if not path.is_file():
        return False
    try:
        return load_sketch(path).metadata.adapter == digest_of(load_adapter(file))
    except FusionError:  # damaged: made again
        return False


def new_draft(space: Workspace) -> Path:
    """A free place for a fused adapter; old drafts go."""
    for path in space.folder("drafts").iterdir():
        if time.time() - path.stat().st_mtime > OLD:
            path.unlink()
    return space.new("drafts", "fused", library.SUFFIX)


def keep(space: Workspace, draft: str, name: str, preview: Path | None) -> str:
    """Move a draft into the library under a free name, which is returned."""
    if not draft:
        raise StudioError("fuse some adapters first: there is nothing to save.")
    source = space.find("drafts", draft)
    target = space.new("adapters", library.checked_title(name), library.SUFFIX, *library.BESIDE)
    shutil.move(source, target)
    if preview is not None:
        shutil.copyfile(preview, target.with_suffix(".png"))
    return target.stem


def prompts_to_compare(cards: Sequence[Card]) -> list[str]:
    """All concepts together, then each alone; the last words of a prompt are the same."""
    words = [word for card in cards for word in card.triggers()]
    if not words:
        return [BACKGROUND.removeprefix("on ")]
    return [_together(words), *(f"a {word} {BACKGROUND}" for word in words[:3])]


def _together(words: Sequence[str]) -> str:
    if len(words) == 2:
        return f"a {words[0]} on the left and a {words[1]} on the right {BACKGROUND}"
    return f"{' and '.join(f'a {word}' for word in words)} {BACKGROUND}"
