"""The dialects of adapter files: each tool's names of modules and its form of file.

Files mix suffixes and may mix dialects, so each tensor's name is recognised on its own.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from rite_diffusion.adapters.adapter import Adapter, foreign_metadata, info_of
from rite_diffusion.adapters.assemble import assemble, split_key
from rite_diffusion.adapters.dialects import (
    comfyui,
    diffusers,
    embeddings,
    foreign,
    kohya,
    peft,
    peft_settings,
)
from rite_diffusion.adapters.families import family_of_file
from rite_diffusion.adapters.names import split_name
from rite_diffusion.adapters.native import NATIVE, flow_family, flow_name, with_parts
from rite_diffusion.adapters.storage import dtype_of
from rite_diffusion.errors import AdapterError
from rite_diffusion.types import LoraPair


@dataclass(frozen=True)
class Dialect:
    """How one tool's adapter files are read and written."""

    module_of: Callable[[str], str | None]  # stem of a tensor's name -> the toolkit's module name
    write: Callable[[Path, Adapter], None]  # a file, or for PEFT a folder; without embeddings


DIALECTS = {
    "kohya": Dialect(kohya.module_of, kohya.write),
    "diffusers": Dialect(diffusers.module_of, diffusers.write),
    "peft": Dialect(peft.module_of, peft.write),
    "comfyui": Dialect(comfyui.module_of, comfyui.write),
}


def locate(key: str) -> tuple[str, str, str] | None:
    """(dialect, module name, role) of a tensor's name; None where no dialect has such a name."""
    split = split_key(key)
    if split is None:
        return None
    stem, role = split
    for dialect, rules in DIALECTS.items():
        name = rules.module_of(stem)
        if name is not None:
            return dialect, name, role
    return None


def interpret(
    tensors: Mapping[str, Tensor],
    header: Mapping[str, str],
    word: str,
    configs: Mapping[str, Mapping[str, Any]],
) -> Adapter:
    """The adapter in a file's tensors, of any dialects.

    `word` names a learned embedding that the file does not name; `configs` are PEFT's, by
    component. AdapterError where a tensor is unknown, missing or damaged.
    """
    tokens, others = embeddings.split_tokens(tensors, word)
    modules: dict[str, dict[str, Tensor]] = {}
    dialects: Counter[str] = Counter()
    unknown = []
    for key, value in others.items():
        place = locate(key)
        if place is None:
            unknown.append(key)
            continue
        dialect, name, role = place
        name = flow_name(name)
        if role in modules.setdefault(name, {}):
            raise AdapterError(f"the file holds the {role} of module {name} twice (second: {key})")
        modules[name][role] = value
        dialects[dialect] += 1
    if unknown or not (modules or tokens):
        raise AdapterError(
            f"not an adapter that this version reads: {len(unknown)} of {len(tensors)} tensors "
            "are unknown"
            + (f" (first: {unknown[0][:120]!r})." if unknown else "")
            + foreign.describe(unknown)
        )
    peft_settings.check_modules(configs, modules)
    pairs, shifts, findings = assemble(modules, peft_settings.stated_scale(configs))
    pairs, flow = _of_flow(pairs, info_of(header).family)
    dialect = ", ".join(name for name, _ in dialects.most_common()) or "embedding"
    info = info_of(header)
    found = family_of_file(header, tensors) if flow is None else flow
    info = replace(info, family=info.family or found or "")
    notes = findings.notes()
    return Adapter(
        pairs, info, tokens, dialect, notes, shifts, dtype_of(tensors), foreign_metadata(header)
    )


def _of_flow(pairs: list[LoraPair], stated: str) -> tuple[list[LoraPair], str | None]:
    """Pairs by diffusers' names, and the family where they are a flow transformer's, else None."""
    own = [pair for pair in pairs if split_name(pair.name)[0] == "transformer"]
    if not own:
        return pairs, None
    family = stated if stated in NATIVE else flow_family(own)
    return with_parts(pairs, family) if family else pairs, family
