"""The dialects of adapter files: how each tool names modules, and how its files are written.

A file may mix dialects and does mix suffixes, so each tensor's name is recognised by itself.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from rite_diffusion.adapters.adapter import Adapter, foreign_of, info_of
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
from rite_diffusion.adapters.storage import dtype_of
from rite_diffusion.errors import AdapterError


@dataclass(frozen=True)
class Dialect:
    """How one tool's adapter files are read and written."""

    module_of: Callable[[str], str | None]  # a tensor name's stem -> the toolkit's module name
    write: Callable[[Path, Adapter], None]  # one file, or for PEFT a folder; tokens are left out


DIALECTS = {
    "kohya": Dialect(kohya.module_of, kohya.write),
    "diffusers": Dialect(diffusers.module_of, diffusers.write),
    "peft": Dialect(peft.module_of, peft.write),
    "comfyui": Dialect(comfyui.module_of, comfyui.write),
}


def locate(key: str) -> tuple[str, str, str] | None:
    """Dialect, module name and role of a tensor by its name; None where it is nobody's."""
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
    """The adapter that a file's tensors mean, in whatever dialects; AdapterError for others.

    `word` calls an embedding that does not name itself; `configs` are PEFT's, by component.
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
        if role in modules.setdefault(name, {}):
            raise AdapterError(f"the {role} of module {name} is there twice (as {key} too)")
        modules[name][role] = value
        dialects[dialect] += 1
    if unknown or not (modules or tokens):
        raise AdapterError(
            f"not an adapter that this version reads: {len(unknown)} of {len(tensors)} tensors "
            "are unknown"
            + (f" (first: {unknown[0][:120]!r})." if unknown else "")
            + foreign.named(unknown)
        )
    peft_settings.check_modules(configs, modules)
    pairs, shifts, findings = assemble(modules, peft_settings.stated_scale(configs))
    spoken = ", ".join(name for name, _ in dialects.most_common()) or "embedding"
    info = info_of(header)
    info = replace(info, family=info.family or family_of_file(header, tensors) or "")
    notes = findings.notes()
    return Adapter(
        pairs, info, tokens, spoken, notes, shifts, dtype_of(tensors), foreign_of(header)
    )
