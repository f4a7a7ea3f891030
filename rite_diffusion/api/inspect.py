"""`rite.inspect`: the content of an adapter file."""

from pathlib import Path

from rite_diffusion.adapters import Adapter, load_adapter
from rite_diffusion.files.writing import user_path


def inspect(path: str | Path) -> Adapter:
    """The content of an adapter file; AdapterError where it is damaged or not an adapter."""
    return load_adapter(user_path(path))
