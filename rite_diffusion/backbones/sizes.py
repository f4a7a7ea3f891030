"""The sizes of a base's parts, from the headers of its files, before anything is loaded."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch

from rite_diffusion.backbones.checkpoint import read_header
from rite_diffusion.backbones.families import denoiser_and_whole, index_of
from rite_diffusion.config import MemorySection
from rite_diffusion.errors import BackboneError
from rite_diffusion.files.writing import user_path

UNUSED = ("safety_checker", "feature_extractor", "image_encoder")  # parts that are never loaded
CGROUP = Path("/sys/fs/cgroup/memory.max")  # a container's limit, on Linux


def part_sizes(base: str) -> dict[str, int]:
    """Number of weights of each part (`unet`, `text_encoder`, …) of a base.

    Of a hub model whose index alone is in the cache, its files' headers are downloaded. Empty where
    nothing can be known: no such base, no connection, no safetensors.
    """
    file, whole = denoiser_and_whole(base)
    path = user_path(whole)
    try:
        if path.is_file():
            return {"checkpoint": _weights_in(path)}
        is_here = whole == "pocket" or path.exists()
        if not is_here and not _is_known(whole):
            return {}
        index = index_of(whole)
        names = _part_names(index)
        sizes = _folder_sizes(index.parent, names)
        if set(sizes) != set(names) and not is_here:
            sizes = _hub_sizes(whole, names)
        return sizes | ({"transformer": _weights_in(file)} if file else {})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, BackboneError):
        return {}


def _is_known(model: str) -> bool:
    """Whether the index of a hub model is in the cache."""
    if model.count("/") != 1:
        return False
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(model, "model_index.json"), str)


def _part_names(index: Path) -> list[str]:
    """The parts with weights that a model_index.json lists."""
    parts = json.loads(index.read_text(encoding="utf-8"))
    return [
        name
        for name, kind in parts.items()
        if isinstance(kind, list)
        and all(kind)
        and name not in UNUSED
        and not name.startswith(("tokenizer", "scheduler", "processor"))
    ]


def _weights_in(path: Path) -> int:
    return sum(math.prod(shape) for shape in read_header(path).shapes.values())


def _plain(names: list[str]) -> list[str]:
    """Weight files without those of a variant, such as model.fp16.safetensors beside the whole."""
    files = [name for name in names if name.endswith(".safetensors")]
    return [name for name in files if ".fp16." not in name and ".bf16." not in name] or files


def _folder_sizes(folder: Path, names: list[str]) -> dict[str, int]:
    found = {name: _plain([str(path) for path in (folder / name).glob("*")]) for name in names}
    return {
        name: sum(_weights_in(Path(path)) for path in files)
        for name, files in found.items()
        if files
    }


def _hub_sizes(model: str, names: list[str]) -> dict[str, int]:
    from huggingface_hub import HfApi

    api = HfApi()
    files = [each.rfilename for each in api.model_info(model).siblings or []]
    return {
        name: sum(
            sum(api.parse_safetensors_file_metadata(model, path).parameter_count.values())
            for path in _plain([path for path in files if path.startswith(f"{name}/")])
        )
        for name in names
    }


def system_memory() -> int:
    """Bytes of memory that this process may have: the machine's with swap, or a container's."""
    whole = psutil.virtual_memory().total + psutil.swap_memory().total
    text = CGROUP.read_text().strip() if CGROUP.is_file() else ""
    return min(whole, int(text)) if text.isdigit() else whole


def describe_bytes(parts: dict[str, float]) -> str:
    """A text such as "13.2 GB: transformer 12.3, text_encoder 0.9"; the largest part first."""
    largest = sorted(parts.items(), key=lambda each: -each[1])
    listed = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in largest)
    return f"{sum(parts.values()) / 1e9:.1f} GB: {listed}"


def stored_bytes(
    sizes: dict[str, int], dtype: torch.dtype, memory: MemorySection
) -> dict[str, float]:
    """The least bytes of each part's weights with the settings of `[memory]`."""
    each = {"full": dtype.itemsize, "int8": 1, "fp8": 1, "nf4": 0.5}
    storage = {"transformer": memory.weights, "unet": memory.weights}
    return {
        name: count * each[memory.encoder_weights if "text" in name else storage.get(name, "full")]
        for name, count in sizes.items()
    }


def device_bytes(parts: dict[str, float], offload: str) -> float:
    """The least bytes of the parts' weights that are on the device at once."""
    if offload == "model":
        return max(parts.values(), default=0)
    waiting = ("transformer", "unet") if offload == "layers" else ()
    return sum(size for name, size in parts.items() if name not in waiting)


def largest_stage(
    parts: dict[str, float], stages: Sequence[Sequence[str]] | None
) -> dict[str, float]:
    """The parts of the stage that needs most; all where they are not loaded in `stages`.

    A stage names its parts. Parts that no stage names are in memory in each.
    """
    if not stages:
        return parts
    named = {name for stage in stages for name in stage}
    held = [
        {name: size for name, size in parts.items() if name in stage or name not in named}
        for stage in stages
    ]
    return max(held, key=lambda each: sum(each.values()))


def refuse_too_large(
    base: str,
    dtype: torch.dtype,
    device: torch.device,
    memory: MemorySection | None = None,
    stages: Sequence[Sequence[str]] | None = None,
) -> None:
    """BackboneError for a base whose weights do not fit into the machine or its device.

    With `stages`, only the parts that one of them names are in memory at once.
    """
    memory = memory or MemorySection()
    by_hooks = memory.offload == "model"  # which need all parts in main memory
    whole = stored_bytes(part_sizes(base), dtype, memory)
    parts = largest_stage(whole, None if by_hooks else stages)
    room = {"this machine": (sum(parts.values()), system_memory())}
    if device.type == "cuda":
        most = torch.cuda.mem_get_info(device)[1]
        room[torch.cuda.get_device_name(device)] = (device_bytes(parts, memory.offload), most)
    for place, (needed, most) in room.items():
        if needed > most:
            remedy = "Store them in 8 bits (memory.weights = int8), or choose a smaller base."
            if dtype.itemsize > 2:
                remedy = "Load it in bf16 or fp16, or choose a smaller base."
            raise BackboneError(
                f"the weights of {base} take {describe_bytes(parts)}; {place} has "
                f"{most / 1e9:.1f} GB. {remedy}"
            )
