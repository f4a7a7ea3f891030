"""Safetensors files: read with checks of their format, written atomically."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from rite_diffusion.errors import AdapterError
from rite_diffusion.files.writing import reading, write_output

MAX_HEADER = 100_000_000  # bytes; safetensors itself refuses longer ones
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    header: dict[str, str],
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write tensors in `dtype`, scalars in fp32, and a header, atomically.

    AdapterError where a number is too large for `dtype`.
    """
    ready = {
        key: value.detach().to("cpu", dtype if value.ndim else torch.float32).contiguous()
        for key, value in tensors.items()
    }
    for key, value in ready.items():
        if not torch.isfinite(value).all():
            raise AdapterError(f"{key} holds numbers that are too large for {dtype_name(dtype)}")
    write_output(path, with_sorted_metadata(save(ready, {"format": "pt"} | header)))


def dtype_name(dtype: torch.dtype) -> str:
    """`fp32`, `fp16` or `bf16`."""
    return next(name for name, each in DTYPES.items() if each == dtype)


def dtype_of(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """The dtype that all tensors but scalars have in common; fp32 where they differ."""
    found = {value.dtype for value in tensors.values() if value.numel() > 1}
    [only] = found if len(found) == 1 else [torch.float32]
    return only if only in DTYPES.values() else torch.float32


def with_sorted_metadata(content: bytes) -> bytes:
    """A safetensors file's bytes with the header's metadata sorted by key.

    safetensors writes it in a random order, so that equal files would have different bytes.
    """
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text + content[end:]


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file; AdapterError where it is missing or damaged."""
    header = read_header(path)
    try:
        return load_file(path), header
    except (SafetensorError, ValueError, OSError) as error:
        raise AdapterError(f"{path} is damaged: {error}. Get the file again.") from None


def read_header(path: Path) -> dict[str, str]:
    """A file's metadata; AdapterError where the file or its header is damaged."""
    if not path.is_file():
        raise AdapterError(f"no adapter file {path}. Pass the path of a .safetensors file.")
    with reading(path, AdapterError), path.open("rb") as stream:
        start = stream.read(512)
        _refuse_other_formats(path, start)
        size = struct.unpack("<Q", start[:8])[0]
        if size > path.stat().st_size - 8:
            raise AdapterError(
                f"{path} is not a safetensors file, or it is cut off. Get the file again."
            )
        if size > MAX_HEADER:
            raise AdapterError(
                f"{path} has a header of {size:,} bytes; the format allows {MAX_HEADER:,}. "
                "Ask its author for a file with a smaller one."
            )
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
    metadata = (header.get("__metadata__") or {}) if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise AdapterError(f"{path} has a damaged header (no metadata). Get the file again.")
    return metadata


def _no_duplicates(items: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(items)
    if len(result) < len(items):
        names = [key for key, _ in items]
        raise KeyError(next(key for key in names if names.count(key) > 1))
    return result


def _refuse_other_formats(path: Path, start: bytes) -> None:
    if start[8:9] == b"{":  # a header; the length before it may look like another format's mark
        return
    if start[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
        raise AdapterError(
            f"{path} is a pickle, which can run code when opened: refused. "
            "Ask its author for a .safetensors file, or let `rite convert FILE --published-pickle` "
            "make one of an embedding or of published weights."
        )
    if start.lstrip()[:1] == b"<":
        raise AdapterError(f"{path} is a web page, not an adapter: the download went wrong.")
    if start.startswith(b"version https://git-lfs"):
        raise AdapterError(
            f"{path} is a Git LFS pointer: run `git lfs pull` to get the file itself."
        )
    if len(start) < 8:
        raise AdapterError(f"{path} is empty or cut off. Get the file again.")
