"""Tensors on disk that can be made again, so that the next run need not make them."""

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
    """The tensors of a cache entry, among them `name`.

    An entry that is not there or cannot be read is made and written; RunError where that fails.
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
    """The tensors of an entry; none where there is no entry, or a damaged one."""
    try:
        tensors = load(path.read_bytes())
    except (OSError, SafetensorError):
        return {}
    return tensors if all(bool(torch.isfinite(each).all()) for each in tensors.values()) else {}


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Writing to a folder of the cache; RunError where it cannot be written."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"cannot write to the cache {folder}: {error.strerror or error}. Make room there, or "
            "name another folder in the environment variable RITE_CACHE."
        ) from error
