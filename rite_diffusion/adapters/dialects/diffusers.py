"""Diffusers' names: `<component>.<path>` with PEFT's suffixes, one file for all components.

Without metadata the scale is 1. Alpha may stand in the header's `lora_adapter_metadata` (JSON, keys
prefixed by the component), which other tools do not read. So files are written with the scale
multiplied into `lora_B` and a header that states scale 1.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from rite_diffusion.adapters import lycoris
from rite_diffusion.adapters.adapter import Adapter, metadata_of
from rite_diffusion.adapters.dialects import peft
from rite_diffusion.adapters.dialects.peft_settings import check_config
from rite_diffusion.adapters.names import PREFIXES, dotted, module_name, split_name
from rite_diffusion.adapters.storage import write_tensors
from rite_diffusion.errors import AdapterError
from rite_diffusion.types import LoraPair

METADATA = "lora_adapter_metadata"
_ROOTS = ("down_blocks.", "mid_block.", "up_blocks.")  # in files for a UNet only
_OLD_ATTENTION = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


def module_of(stem: str) -> str | None:
    """The toolkit's name of a module; None where the stem is not diffusers'."""
    for component in PREFIXES:
        if stem.startswith(f"{component}."):
            return module_name(component, _path(component, stem.removeprefix(f"{component}.")))
    return module_name("unet", _path("unet", stem)) if stem.startswith(_ROOTS) else None


def _path(component: str, path: str) -> str:
    """Today's path of a module; until 2023-09 LoRA layers were part of attention processors."""
    path = path.replace(".processor.", ".")
    leaf = path.rpartition(".")[2]
    if component == "transformer":
        return path
    if component == "unet":
        return f"{path}.0" if leaf == "to_out" else path
    return path.removesuffix(leaf) + _OLD_ATTENTION.get(leaf, leaf)


def configs_of(header: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """PEFT configurations by component, from a file's header; AdapterError where it is damaged."""
    if METADATA not in header:
        return {}
    try:
        stated = json.loads(header[METADATA])
    except json.JSONDecodeError as error:
        raise AdapterError(f"its header's {METADATA} is not JSON ({error})") from None
    if not isinstance(stated, dict):
        raise AdapterError(f"its header's {METADATA} is not a table")
    configs: dict[str, dict[str, Any]] = {}
    for key, value in stated.items():
        component, _, setting = key.partition(".")
        configs.setdefault(component, {})[setting] = value
    for component, config in configs.items():
        if component in PREFIXES:
            check_config(config)
    return configs


def tensors_of(adapter: Adapter) -> dict[str, Tensor]:
    """The tensors of a file with the adapter's pairs, the scale multiplied into `lora_B`."""
    tensors = {}
    for pair in adapter.pairs:
        component, flat = split_name(pair.name)
        tensors |= peft.pair_tensors(f"{component}.{dotted(flat)}", at_scale_one(pair))
    for update in map(lycoris.at_scale_one, adapter.products):
        component, flat = split_name(update.name)
        stem = f"{component}.{dotted(flat)}"
        tensors |= {f"{stem}.{key}": value for key, value in update.parts.items()}
    return tensors


def at_scale_one(pair: LoraPair) -> LoraPair:
    """The pair with its scale multiplied into `up`."""
    return LoraPair(pair.name, pair.down, pair.up * pair.scale, 1.0, pair.magnitude)


def header_of(adapter: Adapter) -> dict[str, str]:
    """Other tools' entries, our metadata, and a PEFT configuration of scale 1 per component."""
    stated = {}
    for component in PREFIXES:
        pairs = [at_scale_one(p) for p in adapter.pairs if split_name(p.name)[0] == component]
        if pairs:
            config = peft.config_of(pairs, [peft.path_of(pair.name) for pair in pairs])
            stated |= {f"{component}.{key}": value for key, value in config.items()}
    own = {METADATA: json.dumps(stated)} if stated else {}
    return {**adapter.foreign, **metadata_of(adapter), **own}


def write(path: Path, adapter: Adapter) -> None:
    """Write the pairs as one file; AdapterError where the adapter has shifts."""
    peft.refuse_shifts(adapter, "diffusers")
    write_tensors(path, tensors_of(adapter), header_of(adapter), adapter.dtype)
