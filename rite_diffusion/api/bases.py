"""Base models, opened by name, with adapters attached."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from rite_diffusion.adapters import AdapterInfo
from rite_diffusion.adapters.attach import OR_OTHER_BASE, attach, check_base
from rite_diffusion.adapters.choice import Chosen
from rite_diffusion.backbones.protocols import Backbone
from rite_diffusion.backbones.source import load_backbone
from rite_diffusion.config import memory_settings
from rite_diffusion.errors import AdapterError
from rite_diffusion.generation.attached import attached_name

PLAIN: Mapping[str, str] = {}  # no settings of memory


def load_base(
    base: str = "pocket", precision: str | None = None, memory: Mapping[str, str] = PLAIN
) -> Backbone:
    """The base model of a name: `pocket`, a diffusers folder, a `.safetensors` or a hub id.

    Weights are read in `precision` (fp32, fp16, bf16), by default fp16 on CUDA and fp32 elsewhere.
    `memory` holds settings of a training's `[memory]`, such as {"weights": "int8"}. Raises
    BackboneError where the base cannot be found or opened, and ConfigError for other settings.
    """
    return load_backbone(base, precision, memory=memory_settings(memory))


def open_base(
    base: str | Backbone | None,
    infos: Sequence[AdapterInfo],
    memory: Mapping[str, str] = PLAIN,
) -> Backbone:
    """The base model; by default the first that the adapters record, else `pocket`.

    It is opened with the settings `memory`; an open model is returned unchanged. Raises
    AdapterError where the recorded base is a file or folder that is not here, and BackboneError
    where the base cannot be opened.
    """
    if base is not None and not isinstance(base, str):
        return base
    recorded = [info.base for info in infos if info.base]
    base = base or (recorded[0] if recorded else "pocket")
    if base in recorded and base != "pocket" and "/" not in base and not Path(base).exists():
        raise AdapterError(f"the adapter was made for '{base}': pass its path as --base.")
    return load_backbone(base, memory=memory_settings(memory))


def open_with_adapters(
    base: str | None,
    adapters: list[Chosen],
    other_base: bool = False,
    memory: Mapping[str, str] = PLAIN,
) -> Backbone:
    """The base model of `open_base` with the adapters attached.

    Raises AdapterError for adapters of another base, unless `other_base` accepts them.
    """
    backbone = open_base(base, [each.adapter.info for each in adapters], memory)
    for index, chosen in enumerate(adapters):
        if not other_base:
            check_base(backbone, chosen.adapter, remedy=OR_OTHER_BASE)
        attach(backbone, chosen.adapter, attached_name(index), chosen.weight)
    return backbone
