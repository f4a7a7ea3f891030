"""An adapter in memory: LoRA pairs, learned embeddings and metadata."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import torch
from torch import Tensor

from rite_diffusion.types import LoraPair, ProductUpdate, Shift

HEADER_PREFIX = "rite_"

# Our metadata key -> the key under which other tools store the same.
_FOREIGN = {
    "trigger": "modelspec.trigger_phrase",
    "base": "ss_sd_model_name",
    "optimizer": "ss_optimizer",
    "steps": "ss_steps",
    "licence": "modelspec.license",
}
# Header entries that describe the file's own tensors, so they must not be copied to another file.
_OF_TENSORS = (
    "format",
    "lora_adapter_metadata",
    "modelspec.hash_sha256",
    "sshs_legacy_hash",
    "sshs_model_hash",
)


@dataclass(frozen=True)
class AdapterInfo:
    """An adapter's metadata; a field is empty where the file's header does not state it."""

    trigger: str = ""
    class_noun: str = ""
    base: str = ""
    base_fingerprint: str = ""
    family: str = ""  # of the base: "sd" (1.x and 2.x), "sdxl", "z-image", …
    method: str = ""
    optimizer: str = ""
    steps: str = ""
    images: str = ""
    config: str = ""  # the resolved configuration as TOML
    concepts: str = ""  # of a fused adapter: its sources as a JSON list
    licence: str = ""
    version: str = ""

    def triggers(self) -> list[str]:
        """The trigger words, one for each concept."""
        return [word for word in self.trigger.split(", ") if word]


@dataclass(frozen=True)
class Adapter:
    """LoRA pairs, shifts of biases and norms, learned embeddings, and metadata.

    `tokens` maps a word to its learned embedding (layers, vectors, width), where layers is 1 or the
    number of cross-attentions. `<word>@2` holds the embedding for SDXL's second text encoder.
    """

    pairs: list[LoraPair]
    info: AdapterInfo
    tokens: dict[str, Tensor] = field(default_factory=dict)
    dialect: str = "kohya"  # of the file that it was read from
    notes: tuple[str, ...] = ()  # assumptions made in reading that file
    shifts: list[Shift] = field(default_factory=list)  # differences of biases and norms
    dtype: torch.dtype = torch.float32  # of the factors in that file; in memory they are fp32
    foreign: dict[str, str] = field(default_factory=dict)  # other tools' header entries
    products: list[ProductUpdate] = field(default_factory=list)  # to be written; read as pairs

    def ranks(self) -> list[int]:
        """The distinct ranks, ascending."""
        return sorted({pair.rank for pair in self.pairs})

    def names(self) -> list[str]:
        """The pairs' module names."""
        return [pair.name for pair in self.pairs]

    @property
    def is_of_flow(self) -> bool:
        """Whether it is for a flow transformer."""
        return any(name.startswith("lora_transformer_") for name in self.modules())

    def modules(self) -> set[str]:
        """Names of all modules that it changes, by a pair, a product or a shift."""
        return {each.name for each in (*self.pairs, *self.products, *self.shifts)}


def base_name(base: str) -> str:
    """A base model's name for a header; of a path only the last part, as folders are private."""
    parts = base.split("@")
    return "@".join(Path(part).name if Path(part).exists() else part for part in parts)


def metadata_of(adapter: Adapter) -> dict[str, str]:
    """The adapter's metadata as header entries with the prefix `rite_`."""
    stated = asdict(adapter.info)
    return {HEADER_PREFIX + key: value for key, value in stated.items() if value}


def foreign_metadata(header: Mapping[str, str]) -> dict[str, str]:
    """Other tools' entries of a header, without those that describe the file's own tensors."""
    own = {HEADER_PREFIX + item.name for item in fields(AdapterInfo)}
    return {key: value for key, value in header.items() if key not in own | set(_OF_TENSORS)}


def info_of(header: Mapping[str, str]) -> AdapterInfo:
    """The metadata in a header, read from our keys or else from other tools'."""
    stated = {
        item.name: header.get(HEADER_PREFIX + item.name)
        or header.get(_FOREIGN.get(item.name, ""), "")
        for item in fields(AdapterInfo)
    }
    info = AdapterInfo(**{name: str(value) for name, value in stated.items()})
    return info if _are_concepts(info.concepts) else replace(info, concepts="")


def _are_concepts(text: str) -> bool:
    """Whether a header's `concepts` have the form that a fusion writes."""
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
