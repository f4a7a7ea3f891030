"""Fusions in a workspace: sketches beside the adapters, previews of conflicts, and drafts."""

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

ProgressCallback = Callable[[str, float], None]  # text, and the share done from 0 to 1
OLD = 24 * 3600  # seconds after which an unsaved draft is deleted
BACKGROUND = "on a blue background"
STEPS: int | None = None  # of a picture for statistics; None: as `rite sketch` has them


@dataclass(frozen=True)
class FusionRequest:
    """A requested fusion: adapters with their weights, and the method."""

    cards: tuple[Card, ...]
    weights: tuple[float, ...]
    method: str
    rank: int | None = None
    allow_loss: bool = False  # also where the rank loses more than 1 %

    def files(self) -> list[str]:
        """`FILE:WEIGHT` of each adapter."""
        pairs = zip(self.cards, self.weights, strict=True)
        return [f"{card.path}:{weight:g}" for card, weight in pairs]

    def title(self) -> str:
        """A name for the fused adapter."""
        return name_from(" + ".join(card.name for card in self.cards), "fused")

    def settings(self) -> dict[str, Any]:
        """Settings of the method that differ from its defaults."""
        return {} if self.rank is None else {"rank": self.rank}


def fusion_request(
    space: Workspace,
    chosen: Sequence[tuple[str, float]],
    method: str,
    rank: int | None,
    allow_loss: bool = False,
) -> FusionRequest:
    """The request for adapters given as (name, weight); StudioError for fewer than two."""
    from rite_diffusion.fusion.merge import method_named

    if len(chosen) < 2:
        raise StudioError("choose two adapters or more: one alone needs no fusing.")
    method_named(method)
    cards = tuple(library.find(space, name) for name, _ in chosen)
    return FusionRequest(cards, tuple(weight for _, weight in chosen), method, rank, allow_loss)


def preview_fusion(
    studio: Studio, space: Workspace, fusion: FusionRequest, progress: ProgressCallback
) -> "FusionPreview":
    """The fused adapter with its conflict report; nothing is written but missing sketches."""
    from rite_diffusion.api import fuse as merging

    _measure(studio, space, fusion, progress)
    progress("Comparing the layers…", 1.0)
    return merging.preview_fusion(fusion.files(), method=fusion.method, **fusion.settings())


def fuse(
    studio: Studio, space: Workspace, fusion: FusionRequest, out: Path, progress: ProgressCallback
) -> "FusionPreview | Merged":
    """Write the fused adapter and return it; with a report where all adapters have sketches."""
    from rite_diffusion.adapters import save_adapter
    from rite_diffusion.api import fuse as merging
    from rite_diffusion.fusion import FUSIONS
    from rite_diffusion.fusion.settings import checked_settings

    if FUSIONS[fusion.method].statistics:
        _measure(studio, space, fusion, progress)
    progress("Fusing the layers…", 1.0)
    measured = all(_has_sketch(card.path) for card in fusion.cards)
    combine = merging.preview_fusion if measured else merging.fused_adapter
    made = combine(fusion.files(), method=fusion.method, **fusion.settings())
    merging.check_loss(made.loss, checked_settings(fusion.settings()), fusion.allow_loss)
    save_adapter(out, made.adapter)
    return made


def _measure(
    studio: Studio, space: Workspace, fusion: FusionRequest, progress: ProgressCallback
) -> None:
    """Write the sketches that are missing or out of date beside the adapters."""
    from rite_diffusion.api import sketch as sketching
    from rite_diffusion.fusion.statistics import Drawing

    missing = [card for card in fusion.cards if not _has_sketch(card.path)]
    for card in missing:
        if not card.triggers():
            raise StudioError(
                f"'{card.name}' does not record its trigger, so no statistics can be "
                "drawn: choose a method without statistics, such as concat."
            )
    if not missing:
        return
    with studio.engine.exclusive_base(space, "", [card.base for card in fusion.cards]) as backbone:
        for index, card in enumerate(missing):
            count = partial(_count_pictures, progress, card.name, index, len(missing))
            sketching.sketch(
                card.path,
                base=backbone,
                drawing=Drawing() if STEPS is None else Drawing(steps=STEPS),
                overwrite=True,
                progress=count,
            )


def _count_pictures(
    progress: ProgressCallback, name: str, index: int, concepts: int, done: int, total: int
) -> None:
    """Report `done` of `total` pictures for the statistics of concept `index` of several."""
    words = f"Statistics of the layers' inputs for {name}: picture {done} of {total}"
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
    """A free path for a fused adapter; deletes old drafts."""
    for path in space.folder("drafts").iterdir():
        if time.time() - path.stat().st_mtime > OLD:
            path.unlink()
    return space.new("drafts", "fused", library.SUFFIX)


def save_draft(space: Workspace, draft: str, name: str, preview: Path | None) -> str:
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
    """Prompts with all concepts together, then with each alone, on the same background."""
    words = [word for card in cards for word in card.triggers()]
    if not words:
        return [BACKGROUND.removeprefix("on ")]
    return [_together(words), *(f"a {word} {BACKGROUND}" for word in words[:3])]


def _together(words: Sequence[str]) -> str:
    if len(words) == 2:
        return f"a {words[0]} on the left and a {words[1]} on the right {BACKGROUND}"
    return f"{' and '.join(f'a {word}' for word in words)} {BACKGROUND}"
