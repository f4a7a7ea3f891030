"""PEFT's folders: `adapter_model.safetensors` with an `adapter_config.json`, one per component.

    base_model.model.<path>.lora_A.weight            (rank, in) or (rank, in, k, k)
    base_model.model.<path>.lora_B.weight            (out, rank) or (out, rank, 1, 1)
    base_model.model.<path>.lora_magnitude_vector    (out,) or (1, out, 1, 1), for DoRA

The configuration holds alpha, rank, their exceptions by module, and `use_rslora`, with which
scale = alpha / sqrt(rank).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from rite_diffusion.adapters.adapter import Adapter, metadata_of
from rite_diffusion.adapters.dialects.peft_settings import Config, check_config
from rite_diffusion.adapters.names import PREFIXES, dotted, module_name, split_name
from rite_diffusion.adapters.native import is_of_flow
from rite_diffusion.adapters.storage import read_tensors, write_tensors
from rite_diffusion.errors import AdapterError
from rite_diffusion.files.writing import write_atomically
from rite_diffusion.types import LoraPair

MODEL, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
_UNET_ROOTS = (
    "down_blocks.",
    "mid_block.",
    "up_blocks.",
    "conv_in",
    "conv_out",
    "time_embedding.",
    "add_embedding.",
)


def component_of(path: str) -> str:
    """The component of a dotted path, which may start with the component's name."""
    named = [component for component in PREFIXES if path.startswith(f"{component}.")]
    if named:
        return named[0]
    if path.startswith(_UNET_ROOTS):
        return "unet"
    return "transformer" if is_of_flow(path.replace(".", "_")) else "text_encoder"


def module_of(stem: str) -> str | None:
    """The toolkit's name of a module; None where the stem is not PEFT's."""
    if not stem.startswith(PREFIX):
        return None
    path = stem.removeprefix(PREFIX)
    for component in PREFIXES:
        if path.startswith(f"{component}."):
            return module_name(component, path.removeprefix(f"{component}."))
    return module_name(component_of(path), path)


def read_folder(folder: Path) -> tuple[dict[str, Tensor], dict[str, str], dict[str, Config]]:
    """Tensors, metadata, and configurations by component, of a PEFT folder.

    The folder holds one adapter, or folders `unet`, `text_encoder`, … with one each; then tensor
    names are prefixed by the component. AdapterError where neither is there.
    """
    if (folder / CONFIG).is_file():
        return read_beside(folder / MODEL, *read_tensors(folder / MODEL))
    parts = [name for name in PREFIXES if (folder / name / CONFIG).is_file()]
    if not parts:
        raise AdapterError(
            f"{folder} holds no {CONFIG}: pass a PEFT folder, or the path of a .safetensors file."
        )
    tensors, header, configs = {}, {}, {}
    for component in parts:
        found, header = read_tensors(folder / component / MODEL)
        tensors |= _below(component, found)
        configs[component] = read_config(folder / component)
    return tensors, header, configs


def read_beside(
    file: Path, tensors: dict[str, Tensor], header: dict[str, str]
) -> tuple[dict[str, Tensor], dict[str, str], dict[str, Config]]:
    """A file's tensors, metadata, and the configuration beside it where its names are PEFT's."""
    paths = [key.removeprefix(PREFIX) for key in tensors if key.startswith(PREFIX)]
    if not paths or not (file.parent / CONFIG).is_file():
        return tensors, header, {}
    config = read_config(file.parent)
    components = {component_of(path) for path in paths}
    if components == {"text_encoder"} and file.parent.name in PREFIXES:
        components = {file.parent.name}  # the second text encoder has the first one's paths
    if len(components) == 1:
        tensors = _below(min(components), tensors)
    return tensors, header, dict.fromkeys(components, config)


def _below(component: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with the component in their names."""
    return {
        f"{PREFIX}{component}.{key.removeprefix(PREFIX).removeprefix(f'{component}.')}": value
        for key, value in tensors.items()
    }


def read_config(folder: Path) -> Config:
    """A folder's configuration; AdapterError where a setting of it cannot be honoured."""
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise AdapterError(f"{path} cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise AdapterError(f"{path} is not a table of settings")
    try:
        check_config(config)
    except AdapterError as error:
        raise AdapterError(f"{path}: {error}.") from None
    return config


def config_of(pairs: list[LoraPair], paths: list[str]) -> dict[str, Any]:
    """PEFT's configuration of a component's pairs at paths.

    AdapterError where only some pairs are DoRA, which PEFT cannot express.
    """
    dora = [pair.magnitude is not None for pair in pairs]
    if any(dora) and not all(dora):
        raise AdapterError(
            f"{sum(dora)} of {len(dora)} modules are DoRA: PEFT and diffusers read all or none"
        )
    ranks = {path: pair.rank for path, pair in zip(paths, pairs, strict=True)}
    alphas = {path: pair.scale * pair.rank for path, pair in zip(paths, pairs, strict=True)}
    rank, alpha = _most_common(list(ranks.values())), _most_common(list(alphas.values()))
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {path: value for path, value in ranks.items() if value != rank},
        "alpha_pattern": {path: value for path, value in alphas.items() if value != alpha},
        "target_modules": paths,
        "use_dora": all(dora),
    }


def _most_common(values: list) -> Any:
    return max(set(values), key=values.count)


def path_of(name: str) -> str:
    """The dotted path of a module in its component, as in transformers >= 5.6 and diffusers."""
    component, flat = split_name(name)
    path = dotted(flat)
    return path.removeprefix("text_model.") if component == "text_encoder" else path


def pair_tensors(stem: str, pair: LoraPair) -> dict[str, Tensor]:
    """A pair's factors and norms with PEFT's suffixes; the scale is left to the configuration."""
    tensors = {f"{stem}.lora_A.weight": pair.down, f"{stem}.lora_B.weight": pair.up}
    if pair.magnitude is not None:
        shape = (1, -1, 1, 1) if pair.down.ndim == 4 else (-1,)
        tensors[f"{stem}.lora_magnitude_vector"] = pair.magnitude.reshape(shape)
    return tensors


def refuse_shifts(adapter: Adapter, target: str) -> None:
    """AdapterError where the adapter has shifts, for which the target has no names."""
    if adapter.shifts:
        raise AdapterError(
            f"{target} reads no differences of biases and norms, of which the adapter has "
            f"{len(adapter.shifts)} (first: {adapter.shifts[0].name}): convert to kohya or comfyui"
        )


def write(path: Path, adapter: Adapter) -> None:
    """Write a PEFT folder for each component into the folder `path`.

    AdapterError where the adapter has shifts, or DoRA on some modules only.
    """
    refuse_shifts(adapter, "PEFT")
    for component in PREFIXES:
        pairs = [pair for pair in adapter.pairs if split_name(pair.name)[0] == component]
        if not pairs:
            continue
        paths = [path_of(pair.name) for pair in pairs]
        config = config_of(pairs, paths) | {
            "peft_type": "LORA",
            "base_model_name_or_path": adapter.info.base or None,
            "bias": "none",
            "inference_mode": True,
        }
        tensors = {}
        for pair, inner in zip(pairs, paths, strict=True):
            tensors |= pair_tensors(PREFIX + inner, pair)
        folder = path / component
        folder.mkdir(parents=True, exist_ok=True)
        header = {**adapter.foreign, **metadata_of(adapter)}
        write_tensors(folder / MODEL, tensors, header, adapter.dtype)
        write_atomically(folder / CONFIG, json.dumps(config, indent=2).encode())
