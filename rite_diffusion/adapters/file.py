"""The adapter file: one `.safetensors` in kohya's names, learned tokens, and a header of facts.

ComfyUI, A1111 and diffusers read it where it holds no tokens. Files of all dialects are read, and
everything is checked before it touches a model.
"""

from pathlib import Path

from rite_diffusion.adapters.adapter import Adapter, AdapterInfo
from rite_diffusion.adapters.dialects import diffusers, embeddings, interpret, kohya, peft
from rite_diffusion.adapters.storage import read_header, read_tensors, write_tensors
from rite_diffusion.errors import AdapterError

__all__ = [
    "Adapter",
    "AdapterInfo",
    "load_adapter",
    "read_header",
    "save_adapter",
]


def save_adapter(path: str | Path, adapter: Adapter) -> None:
    """Write the file atomically: a reader sees the old one or the new one, whole."""
    tensors = kohya.tensors_of(adapter) | embeddings.own_tensors(adapter)
    write_tensors(Path(path), tensors, kohya.header_of(adapter))


def load_adapter(path: str | Path) -> Adapter:
    """The adapter in a file or a PEFT folder; AdapterError says what is wrong with any other."""
    path = Path(path)
    if path.is_dir():
        tensors, header, configs = peft.read_folder(path)
    else:
        tensors, header, configs = peft.read_beside(path, *read_tensors(path))
    try:
        configs = configs or diffusers.configs_of(header)
        return interpret(tensors, header, path.stem, configs)
    except AdapterError as error:
        raise AdapterError(f"{path}: {error}.") from None
