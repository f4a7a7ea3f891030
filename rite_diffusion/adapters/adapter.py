"""An adapter in memory: LoRA pairs, learned tokens and the facts about them."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import torch
from torch import Tensor

from rite_diffusion.types import LoraPair, Shift

HEADER_PREFIX = "rite_"

# Facts that other tools' headers hold, by ours.
_FOREIGN = {
    "trigger": "modelspec.trigger_phrase",
    "base": "ss_sd_model_name",
    "optimizer": "ss_optimizer",
    "steps": "ss_steps",
    "licence": "modelspec.license",
}
# What a header says of the file's own tensors: it would be wrong of another file's.
_OF_TENSORS = (
    "format",
    "lora_adapter_metadata",
    "modelspec.hash_sha256",
    "sshs_legacy_hash",
    "sshs_model_hash",
)


@dataclass(frozen=True)
class AdapterInfo:
    """What an adapter's header tells of it; empty where a foreign file does not say."""

    trigger: str = ""
    class_noun: str = ""
    base: str = ""
    base_fingerprint: str = ""
    family: str = ""  # the layout of the base, "sd" or "sdxl"
    method: str = ""
    optimizer: str = ""
    steps: str = ""
    images: str = ""
    config: str = ""  # the resolved configuration as TOML
    concepts: str = ""  # of a fused adapter: JSON, a list of what went into it
    licence: str = ""
    version: str = ""

    def triggers(self) -> list[str]:
        """The words that call its concepts."""
        return [word for word in self.trigger.split(", ") if word]


@dataclass(frozen=True)
class Adapter:
    """LoRA pairs, shifts of vectors, learned tokens, and the facts about them.

    `tokens` holds embeddings (layers, rows, width) by the word that calls them: one layer, or one
    for each cross-attention; a word's rows for a second text encoder are at `<word>@2`.
    """

    pairs: list[LoraPair]
    info: AdapterInfo
    tokens: dict[str, Tensor] = field(default_factory=dict)
    dialect: str = "kohya"  # of the file that it was read from
    notes: tuple[str, ...] = ()  # what had to be assumed in reading it
    shifts: list[Shift] = field(default_factory=list)  # of biases and norms, where it has any
    dtype: torch.dtype = torch.float32  # of the factors in that file; in memory they are fp32
    foreign: dict[str, str] = field(default_factory=dict)  # other tools' header entries

    def ranks(self) -> list[int]:
        """The distinct ranks, ascending."""
        return sorted({pair.rank for pair in self.pairs})

    def names(self) -> list[str]:
        """The pairs' module names."""
        return [pair.name for pair in self.pairs]

    def modules(self) -> set[str]:
        """Names of all modules that it changes, those with shifts alone too."""
        return {each.name for each in (*self.pairs, *self.shifts)}


def shown_base(base: str) -> str:
    """How a header names a base model: of a path its last part, which holds no private folder."""
    return Path(base).name if Path(base).exists() else base


def facts_of(adapter: Adapter) -> dict[str, str]:
    """Our own facts as header entries."""
    facts = asdict(adapter.info)
    return {HEADER_PREFIX + key: value for key, value in facts.items() if value}


def foreign_of(header: Mapping[str, str]) -> dict[str, str]:
    """A header's entries that are not our own facts, without those that tell of its tensors."""
    own = {HEADER_PREFIX + item.name for item in fields(AdapterInfo)}
    return {key: value for key, value in header.items() if key not in own | set(_OF_TENSORS)}


def info_of(header: Mapping[str, str]) -> AdapterInfo:
    """The facts that a header states, in our words or in other tools'."""
    stated = {
        item.name: header.get(HEADER_PREFIX + item.name)
        or header.get(_FOREIGN.get(item.name, ""), "")
        for item in fields(AdapterInfo)
    }
    info = AdapterInfo(**{name: str(value) for name, value in stated.items()})
    return info if _are_concepts(info.concepts) else replace(info, concepts="")


def _are_concepts(text: str) -> bool:
    """Whether a header's `concepts` are what a fusion writes: a header may hold anything."""
    try:
        entries = json.loads(text or "[]")
    except (ValueError, RecursionError):
        return False
    return isinstance(entries, list) and all(
        isinstance(entry, dict)
        and all(isinstance(entry.get(key), str) for key in ("trigger", "class_noun", "file"))
        and type(entry.get("weight")) in (int, float)
        for entry in entries
    )
