"""Adapters as a user names them: `FILE` or `FILE:WEIGHT`."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rite_diffusion.adapters.file import Adapter, load_adapter
from rite_diffusion.adapters.learned_embeddings import free_names, renamed, words_of
from rite_diffusion.errors import AdapterError
from rite_diffusion.files.writing import reading, user_path


@dataclass(frozen=True)
class Record:
    """An adapter in a picture's metadata."""

    file: str
    weight: float
    sha256: str  # of the file: the first 16 hex digits


@dataclass(frozen=True)
class Chosen:
    """An adapter file, its content and its weight."""

    path: Path
    adapter: Adapter
    weight: float
    names: dict[str, str] = field(default_factory=dict)  # learned embeddings renamed: old -> new

    def record(self) -> Record:
        """The entry for a picture's metadata; a PEFT folder's files are hashed in name order."""
        digest = hashlib.sha256()
        files = self.path.rglob("*.safetensors") if self.path.is_dir() else [self.path]
        for file in sorted(files):
            with reading(file, AdapterError):
                digest.update(file.read_bytes())
        return Record(self.path.name, self.weight, digest.hexdigest()[:16])


def choose_adapters(wanted: Sequence[str | Path]) -> list[Chosen]:
    """The adapters of `FILE` or `FILE:WEIGHT` items, in their order.

    A learned embedding whose word an earlier adapter has is renamed. AdapterError for a file that
    is not an adapter and for a weight outside -10 to 10.
    """
    chosen, taken = list[Chosen](), set[str]()
    for item in wanted:
        path, weight = split_weight(str(item))
        adapter = load_adapter(path)
        names = free_names(words_of(adapter), taken)
        adapter = renamed(adapter, names)
        taken |= words_of(adapter).keys()
        chosen.append(Chosen(path, adapter, weight, names))
    return chosen


def notes(chosen: Sequence[Chosen]) -> list[str]:
    """Lines for the user about renamed embeddings and adapters without effect."""
    return [*_renamings(chosen), *_without_effect(chosen)]


def _renamings(chosen: Sequence[Chosen]) -> list[str]:
    """A line for each learned embedding that was renamed."""
    return [
        f"{each.path.name}: its {old} is called {new} here, as another adapter has that word"
        for each in chosen
        for old, new in each.names.items()
    ]


def _without_effect(chosen: Sequence[Chosen]) -> list[str]:
    """A line for each adapter whose layers, or some of them, have a weight or alpha of 0.

    Learned embeddings act at any weight, and a DoRA's norms at any alpha.
    """
    lines = []
    for each in chosen:
        pairs = each.adapter.pairs
        idle = [pair for pair in pairs if pair.scale == 0 and pair.magnitude is None]
        if pairs and each.weight == 0:
            lines.append(f"{each.path.name}: its layers have no effect at weight 0")
        elif idle:
            lines.append(
                f"{each.path.name}: {len(idle)} of {len(pairs)} layers have no effect, as their "
                "alpha is 0"
            )
    return lines


def protected_words(chosen: Sequence[Chosen]) -> list[str]:
    """Words of the adapters that prompts keep whole: learned embeddings and triggers."""
    words = [[*words_of(each.adapter), *each.adapter.info.triggers()] for each in chosen]
    return [word for own in words for word in own]


def split_weight(item: str) -> tuple[Path, float]:
    """Path and weight of `FILE` or `FILE:WEIGHT`; the weight defaults to 1."""
    head, colon, tail = item.rpartition(":")
    try:
        weight = float(tail) if colon else 1.0
    except ValueError:
        return user_path(item), 1.0
    if not -10 <= weight <= 10:
        raise AdapterError(f"weight {tail} of {head} is outside -10 to 10")
    return user_path(head if colon else item), weight
