"""The adapter file: one `.safetensors`, kohya keys with an explicit alpha, and a header of facts.

    <module>.lora_down.weight   (rank, in) or (rank, in, k, k)
    <module>.lora_up.weight     (out, rank) or (out, rank, 1, 1)
    <module>.alpha              scalar; delta W = alpha / rank * up @ down

ComfyUI, A1111 and diffusers read these. Everything is checked before it touches a model.
"""

import json
import math
import os
import struct
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from rite_diffusion.types import AdapterError, LoraPair

DOWN, UP, ALPHA = ".lora_down.weight", ".lora_up.weight", ".alpha"
MAX_HEADER = 16_000_000  # bytes; the header of a real adapter has a few hundred thousand
HEADER_PREFIX = "rite_"


@dataclass(frozen=True)
class AdapterInfo:
    """What an adapter's header tells of it; empty where a foreign file does not say."""

    trigger: str = ""
    class_noun: str = ""
    base: str = ""
    base_fingerprint: str = ""
    method: str = ""
    optimizer: str = ""
    steps: str = ""
    images: str = ""
    config: str = ""  # the resolved configuration as TOML
    concepts: str = ""  # of a fused adapter: JSON, a list of what went into it
    licence: str = ""
    version: str = ""


@dataclass(frozen=True)
class Adapter:
    """LoRA pairs and the facts about them."""

    pairs: list[LoraPair]
    info: AdapterInfo

    def ranks(self) -> list[int]:
        """The distinct ranks, ascending."""
        return sorted({pair.rank for pair in self.pairs})


def _metadata(adapter: Adapter) -> dict[str, str]:
    """The header: our facts, and the few of kohya's that other tools look for."""
    info = adapter.info
    alphas = {f"{pair.scale * pair.rank:g}" for pair in adapter.pairs}
    ranks = [str(rank) for rank in adapter.ranks()]
    facts = {HEADER_PREFIX + key: value for key, value in asdict(info).items() if value}
    return facts | {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": ranks[0] if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": alphas.pop() if len(alphas) == 1 else "Dynamic",
        "ss_output_name": info.trigger,
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": info.trigger,
        "modelspec.trigger_phrase": info.trigger,
        "modelspec.license": info.licence,
    }


def save_adapter(path: Path, adapter: Adapter) -> None:
    """Write the file atomically: a reader sees the old one or the new one, whole."""
    tensors = {}
    for pair in adapter.pairs:
        tensors[pair.name + DOWN] = pair.down.detach().float().cpu().contiguous()
        tensors[pair.name + UP] = pair.up.detach().float().cpu().contiguous()
        tensors[pair.name + ALPHA] = torch.tensor(pair.scale * pair.rank)
    write_atomically(path, save(tensors, _metadata(adapter)))


def write_atomically(path: Path, content: bytes) -> None:
    """Write a temporary file beside `path`, flush it to the disk, and rename it into place."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load_adapter(path: Path) -> Adapter:
    """The adapter in a file; AdapterError says what is wrong with any other file."""
    header = read_header(path)
    try:
        tensors = load_file(path)
    except (SafetensorError, ValueError, OSError) as error:
        raise AdapterError(f"{path} is damaged: {error}. Get the file again.") from None
    pairs = _pairs(path, tensors)
    known = {field.name for field in fields(AdapterInfo)}
    facts = {key.removeprefix(HEADER_PREFIX): str(value) for key, value in header.items()}
    return Adapter(pairs, AdapterInfo(**{key: facts[key] for key in known & facts.keys()}))


def read_header(path: Path) -> dict[str, str]:
    """The header's facts, after the checks that need no tensor."""
    if not path.is_file():
        raise AdapterError(f"no adapter file {path}. Pass the path of a .safetensors file.")
    with path.open("rb") as stream:
        start = stream.read(512)
        _refuse_other_formats(path, start)
        size = struct.unpack("<Q", start[:8])[0]
        if size > MAX_HEADER or size > path.stat().st_size - 8:
            raise AdapterError(f"{path} is no safetensors file or cut off. Get the file again.")
        stream.seek(8)
        content = stream.read(size)
    try:
        header = json.loads(content, object_pairs_hook=_no_duplicates)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise AdapterError(f"{path} has a damaged header ({error}). Get the file again.") from None
    except KeyError as error:
        raise AdapterError(
            f"{path} names the tensor {error} twice, which no tool writes."
        ) from None
    return header.get("__metadata__") or {}


def _no_duplicates(items: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(items)
    if len(result) < len(items):
        names = [key for key, _ in items]
        raise KeyError(next(key for key in names if names.count(key) > 1))
    return result


def _refuse_other_formats(path: Path, start: bytes) -> None:
    if start[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
        raise AdapterError(
            f"{path} is a pickle, which can run code when opened: refused. "
            "Ask its author for a .safetensors file."
        )
    if start.lstrip()[:1] == b"<":
        raise AdapterError(f"{path} is a web page, not an adapter: the download went wrong.")
    if start.startswith(b"version https://git-lfs"):
        raise AdapterError(
            f"{path} is a Git LFS pointer: run `git lfs pull` to get the file itself."
        )
    if len(start) < 8:
        raise AdapterError(f"{path} is empty or cut off. Get the file again.")


def _pairs(path: Path, tensors: dict[str, Tensor]) -> list[LoraPair]:
    suffixes = (DOWN, UP, ALPHA)
    unknown = [key for key in tensors if not key.endswith(suffixes)]
    names = sorted({key.removesuffix(s) for key in tensors for s in suffixes if key.endswith(s)})
    if unknown or not names:
        raise AdapterError(
            f"{path} is not an adapter that this version reads: {len(unknown)} of {len(tensors)} "
            f"tensors are unknown" + (f" (first: {unknown[0]})." if unknown else ".")
        )
    return [_pair(path, name, tensors) for name in names]


def _pair(path: Path, name: str, tensors: dict[str, Tensor]) -> LoraPair:
    if name + DOWN not in tensors or name + UP not in tensors:
        raise AdapterError(f"{path}: {name} has only one of its two factors. Get the file again.")
    down, up = tensors[name + DOWN], tensors[name + UP]
    rank = down.shape[0] if down.ndim else 0
    fits = down.ndim == up.ndim and down.ndim in (2, 4) and rank > 0 and up.shape[1] == rank
    if not fits:
        raise AdapterError(f"{path}: the factors of {name} do not fit: {down.shape}, {up.shape}.")
    if not (torch.isfinite(down).all() and torch.isfinite(up).all()):
        raise AdapterError(f"{path}: {name} holds NaN or infinity: its training went wrong.")
    alpha = tensors.get(name + ALPHA)
    value = float(alpha) if alpha is not None and alpha.numel() == 1 else float(rank)
    if not math.isfinite(value):
        raise AdapterError(f"{path}: the alpha of {name} is {value}.")
    return LoraPair(name, down.float(), up.float(), value / rank)
