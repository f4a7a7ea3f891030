"""Base models by name, opened for the adapters that go into them."""

from collections.abc import Sequence
from pathlib import Path

from rite_diffusion.adapters import AdapterInfo
from rite_diffusion.adapters.attach import attach, check_base
from rite_diffusion.adapters.choice import Chosen
from rite_diffusion.backbones.protocols import Backbone
from rite_diffusion.backbones.source import load_backbone
from rite_diffusion.errors import AdapterError
from rite_diffusion.generation.attached import attached_name


def load_base(base: str = "pocket", precision: str | None = None) -> Backbone:
    """The base model behind a name: `pocket`, a diffusers folder, a `.safetensors` or a hub id.

    Weights are read in `precision` (fp32, fp16, bf16), by default fp16 on CUDA and fp32 elsewhere.
    Raises BackboneError where there is none.
    """
    return load_backbone(base, precision)


def open_base(base: str | Backbone | None, infos: Sequence[AdapterInfo]) -> Backbone:
    """The base model; it defaults to the one that the adapters were made for, else to `pocket`.

    A model that is open already comes back as it is.
    """
    if base is not None and not isinstance(base, str):
        return base
    recorded = [info.base for info in infos if info.base]
    base = base or (recorded[0] if recorded else "pocket")
    if base in recorded and base != "pocket" and "/" not in base and not Path(base).exists():
        raise AdapterError(f"the adapter was made for '{base}': pass its path as --base.")
    return load_backbone(base)


def open_with_adapters(
    base: str | None, adapters: list[Chosen], other_base: bool = False
) -> Backbone:
    """The base model with the adapters attached; it defaults to the base they were made for.

    AdapterError where they were trained on another base, unless `other_base` accepts it.
    """
    backbone = open_base(base, [each.adapter.info for each in adapters])
    for index, chosen in enumerate(adapters):
        if not other_base:
            check_base(backbone, chosen.adapter)
        attach(backbone, chosen.adapter, attached_name(index), chosen.weight)
    return backbone
