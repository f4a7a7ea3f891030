"""The adapter file: one `.safetensors` with kohya's names, learned embeddings and metadata.

Of a flow transformer it has diffusers' names and no alphas, which diffusers and ComfyUI both read.
ComfyUI, A1111 and diffusers read it where it holds no learned embeddings. Files of all dialects are
read, and checked completely.
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
    """Write the adapter as one `.safetensors`, atomically: readers see the old file or the new.

    AdapterError where a tensor is not finite.
    """
    own = diffusers if adapter.is_of_flow else kohya
    tensors = own.tensors_of(adapter) | embeddings.own_tensors(adapter)
    write_tensors(Path(path), tensors, own.header_of(adapter))


def load_adapter(path: str | Path) -> Adapter:
    """The adapter in a `.safetensors` file of any dialect, or in a PEFT folder.

    AdapterError where it is missing, damaged, or not an adapter that can be read.
    """
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
