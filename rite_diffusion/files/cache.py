"""A cache of tensors on disk, for results that can be computed again."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from rite_diffusion.errors import RunError
from rite_diffusion.files.writing import write_atomically


def cached_tensors(
    path: Path, name: str, make: Callable[[], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """The tensors of a cache entry, on the CPU.

    Where the entry is missing, damaged or without the tensor `name`, `make` computes it, and it is
    written. RunError where that fails.
    """
    known = _read(path)
    if name in known:
        return known
    made = {key: value.detach().cpu().contiguous() for key, value in make().items()}
    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, save(made))
    return made


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors of an entry; empty where it is missing or damaged."""
    try:
        tensors = load(path.read_bytes())
    except (OSError, SafetensorError):
        return {}
    return tensors if all(bool(torch.isfinite(each).all()) for each in tensors.values()) else {}


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turns an OSError in the block, which writes to a cache folder, into a RunError."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"cannot write to the cache {folder}: {error.strerror or error}. Make room there, or "
            "name another folder in the environment variable RITE_CACHE."
        ) from error
