"""The adapters of a workspace: trained by its runs, imported, or fused."""

import hashlib
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from safetensors import SafetensorError, safe_open

from rite_diffusion.errors import StudioError
from rite_diffusion.studio.jobs import ACTIVE, state_of
from rite_diffusion.studio.workspace import Workspace, checked_name, name_from

SUFFIX = ".safetensors"
SKETCH = ".sketch.safetensors"  # statistics beside an adapter, for fusions
BESIDE = (".png", SKETCH)  # suffixes of files that belong to an adapter and share its name


@dataclass(frozen=True)
class Card:
    """Facts of an adapter, as the library shows them; empty where the file does not state them."""

    name: str
    path: Path
    run: str  # the run that made it, if any
    trigger: str
    class_noun: str
    base: str
    method: str
    ranks: str
    size: int  # bytes
    preview: Path | None

    @property
    def home(self) -> Path:
        """The path that is renamed or deleted: the run's folder, or the file."""
        return self.path.parent if self.run else self.path

    def beside(self) -> list[Path]:
        """Files beside the adapter that belong to it: its picture and its sketch."""
        own = [self.path.with_suffix(".png"), self.path.with_name(f"{self.path.stem}{SKETCH}")]
        return [] if self.run else [path for path in own if path.exists()]

    def triggers(self) -> list[str]:
        """The triggers of its concepts."""
        return [word for word in self.trigger.split(", ") if word]


def cards(space: Workspace) -> list[Card]:
    """Every adapter that can be read, newest first."""
    found = [
        (f"{run.name}{_clash(space, run.name)}", run / f"adapter{SUFFIX}", run.name)
        for run in space.folder("runs").iterdir()
    ]
    found += [
        (path.stem, path, "")
        for path in space.folder("adapters").glob(f"*{SUFFIX}")
        if not path.name.endswith(SKETCH)
    ]
    whole = [each for each in found if each[1].is_file()]
    whole.sort(key=lambda each: each[1].stat().st_mtime, reverse=True)
    return [card for each in whole if (card := _card(*each)) is not None]


def _clash(space: Workspace, name: str) -> str:
    """The suffix of a run's name: " (run)" where an adapter file has the same name, else ""."""
    return " (run)" if (space.folder("adapters") / f"{name}{SUFFIX}").exists() else ""


def _card(name: str, path: Path, run: str) -> Card | None:
    stat = path.stat()
    read = _read(path, stat.st_mtime_ns, stat.st_size)
    if read is None:
        return None
    facts, ranks = read
    previews = sorted((path.parent / "previews").glob("step-*-0.png")) if run else []
    own = path.with_suffix(".png")
    return Card(
        name=name,
        path=path,
        run=run,
        trigger=facts.get("rite_trigger") or facts.get("modelspec.trigger_phrase", ""),
        class_noun=facts.get("rite_class_noun", ""),
        base=facts.get("rite_base", ""),
        method=facts.get("rite_method", ""),
        ranks=ranks,
        size=stat.st_size,
        preview=previews[-1] if previews else own if own.is_file() else None,
    )


@lru_cache(maxsize=1000)
def _read(path: Path, changed: int, size: int) -> tuple[dict[str, str], str] | None:
    """An adapter's header and ranks, without its tensors; None where it is damaged."""
    try:
        with safe_open(path, framework="numpy") as file:
            downs = [key for key in file.keys() if ".lora_down." in key or ".lora_A." in key]
            ranks = sorted({file.get_slice(key).get_shape()[0] for key in downs})
            return file.metadata() or {}, ", ".join(map(str, ranks))
    except (SafetensorError, OSError):
        return None


def find(space: Workspace, name: str) -> Card:
    """The card of a name; StudioError where there is none."""
    for card in cards(space):
        if card.name == name:
            return card
    raise StudioError(f"there is no adapter '{name}' in the library: choose one from the list.")


def of_run(space: Workspace, run: str) -> Card:
    """The card of the adapter that a run made; StudioError where it has made none yet."""
    for card in cards(space):
        if card.run == run:
            return card
    raise StudioError(f"'{run}' has written no adapter yet: wait for its end, or stop it.")


def with_weights(space: Workspace, chosen: Iterable[tuple[str, float]]) -> list[str]:
    """`FILE:WEIGHT` of each name and weight; StudioError for a name that is not there."""
    known = {card.name: card for card in cards(space)}
    return [f"{(known.get(name) or find(space, name)).path}:{weight:g}" for name, weight in chosen]


def import_adapter(space: Workspace, upload: Path) -> str:
    """Check a file as an adapter and copy it into the library; returns its name there."""
    from rite_diffusion.adapters import load_adapter

    if upload.suffix.lower() != SUFFIX:
        raise StudioError(
            f"{upload.name} is not a {SUFFIX} file: only those are imported, never pickles."
        )
    load_adapter(upload)
    stem = upload.stem.removesuffix(".sketch")
    target = space.new("adapters", name_from(stem, "adapter"), SUFFIX, *BESIDE)
    partial = target.with_suffix(".partial")
    shutil.copyfile(upload, partial)
    partial.rename(target)
    return target.stem


def _idle(card: Card) -> Card:
    """The card; StudioError while its run is queued or active."""
    if card.run and state_of(card.path.parent) in (*ACTIVE, "queued"):
        raise StudioError(f"'{card.name}' is being trained: stop it first.")
    return card


def rename(space: Workspace, old: str, new: str) -> str:
    """Give an adapter another name; returns it."""
    card = _idle(find(space, old))
    name = checked_title(new)
    target = card.home.with_name(name + ("" if card.run else SUFFIX))
    taken = any(target.with_name(name + end).exists() for end in ("", SUFFIX, *BESIDE))
    if taken or name in {each.name for each in cards(space)}:
        raise StudioError(f"there is another '{name}': choose another name.")
    for path in card.beside():
        path.rename(target.with_name(name + path.name.removeprefix(card.path.stem)))
    card.home.rename(target)
    return name


def checked_title(text: str) -> str:
    """The text without spaces around it; StudioError unless it can name an adapter."""
    name = checked_name(text.strip())
    if f"{name}{SUFFIX}".endswith(SKETCH):
        raise StudioError(f"'{name}' is a name of a sketch: leave '.sketch' out.")
    return name


def delete(space: Workspace, name: str) -> None:
    """Move an adapter, its files, and the run that made it into the trash."""
    card = _idle(find(space, name))
    space.move_to_trash(card.home, *card.beside())


def by_digest(space: Workspace) -> dict[str, str]:
    """First 16 hex digits of a file's SHA-256 -> the adapter's name."""
    return {_digest(c.path, c.path.stat().st_mtime_ns): c.name for c in reversed(cards(space))}


@lru_cache(maxsize=1000)
def _digest(path: Path, changed: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
