"""A diffusers folder, opened without weights: each part's are read when it is used."""

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rite_diffusion.backbones.checkpoint import read_header
from rite_diffusion.backbones.families import family_class
from rite_diffusion.backbones.memory import part_quantisation
from rite_diffusion.config import MemorySection
from rite_diffusion.errors import BackboneError

NO_CHECKER = {  # of Stable Diffusion 1 and 2; SDXL's pipeline has none to leave out
    "safety_checker": None,
    "feature_extractor": None,
    "requires_safety_checker": False,
}
UNREADABLE = (OSError, ValueError, KeyError, RuntimeError, SafetensorError)


def options_of(kind: type[DiffusionPipeline]) -> dict[str, Any]:
    """What to pass to a pipeline class besides its parts."""
    return NO_CHECKER if kind.__name__ == "StableDiffusionPipeline" else {}


def weight_files(folder: Path) -> list[Path]:
    """A part's weight files, without those of a variant, as model.fp16.safetensors, beside them."""
    files = sorted(folder.glob("*.safetensors"))
    return [path for path in files if not path.stem.endswith((".fp16", ".bf16"))] or files


class DiffusersFolder:
    """The parts of a folder that `save_pretrained` wrote, in a dtype and settings of memory."""

    def __init__(
        self, folder: Path, kind: type[DiffusionPipeline], dtype: torch.dtype, memory: MemorySection
    ):
        self.folder, self._pipeline, self._dtype, self._memory = folder, kind, dtype, memory
        self._family = family_class(kind.__name__)
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        names = [*self._family.encoder_names, self._family.denoiser_name]
        self._classes = {name: _class_of(index[name]) for name in names if all(index[name])}

    def pipeline(self, **given: Any) -> Any:
        """The pipeline with its tokenizers and scheduler, and models without weights.

        Parts that are `given` are taken as they are. BackboneError where a file of weights is
        damaged or missing, by its header.
        """
        missing = [name for name in self._classes if name not in given]
        for name in missing:
            self._check_files(name)
        empty = {name: self._empty(name) for name in missing}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self._pipeline.from_pretrained(
                str(self.folder),
                torch_dtype=self._dtype,
                local_files_only=True,
                **options_of(self._pipeline) | empty | given,
            )

    def _check_files(self, name: str) -> None:
        files = weight_files(self.folder / name)
        if not files:
            raise BackboneError(
                f"{self.folder / name} has no .safetensors file: get the model again."
            )
        for path in files:
            read_header(path)

    def _empty(self, name: str) -> Any:
        """A part on "meta", in the dtype in which its weights will be read."""
        kind, path = self._classes[name], self.folder / name
        with init_empty_weights(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if kind.__module__.startswith("diffusers"):
                model = kind.from_config(kind.load_config(path))
            else:
                model = kind(kind.config_class.from_pretrained(path))
        return model.to(self._dtype)

    def load(self, name: str) -> Any:
        """A part with its weights in main memory; BackboneError where they cannot be read."""
        kind = self._classes[name]
        dtype = "torch_dtype" if kind.__module__.startswith("diffusers") else "dtype"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return kind.from_pretrained(
                    str(self.folder / name),
                    **{dtype: self._dtype},
                    use_safetensors=True,
                    low_cpu_mem_usage=True,
                    local_files_only=True,
                    quantization_config=part_quantisation(
                        self._memory, self._family, name, self._dtype
                    ),
                )
        except UNREADABLE as error:
            raise BackboneError(f"{self.folder / name} does not open: {error}") from None

    def weights(self, name: str, paths: Sequence[str]) -> list[Tensor] | None:
        """The weights of a part's layers, read alone; None where the files do not have them so."""
        wanted = [f"{path}.weight" for path in paths]
        found: dict[str, Tensor] = {}
        for path in weight_files(self.folder / name):
            with safe_open(path, framework="pt") as file:
                keys = set(file.keys())
                found |= {key: file.get_tensor(key) for key in wanted if key in keys}
        if set(found) != set(wanted):
            return None
        return [found[key].to(self._dtype) for key in wanted]


def _class_of(entry: list[str]) -> Any:
    """The class of a part that a model_index.json lists as [library, class]."""
    import diffusers
    import transformers

    library, name = entry
    return getattr(diffusers if library == "diffusers" else transformers, name)
