"""Loading a base model by the name that a user gives: pocket, folder, file or hub id."""

import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import diffusers.utils.logging
import torch
import transformers.utils.logging
from diffusers import DiffusionPipeline
from torch import Tensor

from rite_diffusion.backbones.families import (
    FAMILIES,
    POCKET,
    denoiser_and_whole,
    denoiser_class,
    family_class,
    family_of,
    is_flow,
    pipeline_name,
)
from rite_diffusion.backbones.folder import UNREADABLE, DiffusersFolder, options_of
from rite_diffusion.backbones.memory import check_memory, denoiser_quantisation
from rite_diffusion.backbones.parts import PartSource, is_empty
from rite_diffusion.backbones.protocols import Backbone, Defaults
from rite_diffusion.backbones.sizes import refuse_too_large
from rite_diffusion.config import MemorySection
from rite_diffusion.errors import BackboneError
from rite_diffusion.files.writing import user_path

# Both libraries print progress bars and warnings that do not help this toolkit's users; warnings at
# their import are turned off in this package's __init__.
for _library in (transformers.utils.logging, diffusers.utils.logging):
    _library.set_verbosity_error()
    _library.disable_progress_bar()

OWN_DEFAULTS = {"pocket": Defaults(guidance=3.0)}  # best for its pictures
PICKLES = {".ckpt", ".pt", ".pth", ".bin", ".pkl"}

LIBRARIES = {"diffusers", "transformers", "stable_diffusion", None}  # of a pipeline's parts

_LOADING = threading.Lock()  # diffusers and transformers patch torch's modules while they load

FULL = MemorySection()  # weights in full, on the device

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def default_device() -> torch.device:
    """CUDA, then Apple's GPU, then the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", 0)
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def load_backbone(
    base: str,
    precision: str | None = None,
    device: torch.device | None = None,
    memory: MemorySection = FULL,
) -> Backbone:
    """The base model of `open_backbone` with all its parts loaded, on the device.

    Raises BackboneError where there is no such model or it is not supported, and ConfigError where
    `memory` cannot be followed.
    """
    device = device or default_device()
    dtype = DTYPES[_checked_precision(base, precision, device)]
    check_memory(memory, base, device)
    refuse_too_large(base, dtype, device, memory)
    backbone = open_backbone(base, precision, device, memory)
    backbone.load()
    return backbone


def open_backbone(
    base: str,
    precision: str | None = None,
    device: torch.device | None = None,
    memory: MemorySection = FULL,
) -> Backbone:
    """The base model `pocket`, or that of a diffusers folder, a `.safetensors` file or a hub id.

    Its parts are loaded when they are used, those of a `.safetensors` file at once.
    `FILE.safetensors@MODEL` is a flow transformer whose denoiser is in the file and whose other
    parts are those of a folder or hub id. Weights are loaded in `precision` (fp32, fp16, bf16), by
    default fp16 on CUDA and fp32 elsewhere; flow transformers, which overflow in fp16, in bf16
    except on a CPU. `memory` says how the weights are stored, and where. Pickles are not opened and
    code from a hub is not run. Raises BackboneError where there is no such model or it is not
    supported, and ConfigError where `memory` cannot be followed.
    """
    device = device or default_device()
    precision = _checked_precision(base, precision, device)
    check_memory(memory, base, device)
    pipeline, source = open_parts(base, DTYPES[precision], memory)
    kind = family_of(pipeline)
    attention = "sdpa" if is_flow(base) else choose_attention(pipeline)
    return kind(pipeline, base, device, attention, source, OWN_DEFAULTS.get(base), memory)


def _checked_precision(base: str, precision: str | None, device: torch.device) -> str:
    """The precision of a base's weights; BackboneError for one that it does not work in."""
    flows = is_flow(base)
    precision = precision or default_precision(device, flows)
    if flows and precision == "fp16":
        raise BackboneError(f"{base} overflows in fp16, as flow transformers do: use bf16 or fp32.")
    return precision


def default_precision(device: torch.device, flows: bool) -> str:
    """The precision of a base's weights where none is wanted; `flows`: of a flow transformer."""
    if device.type == "cpu" or (device.type != "cuda" and not flows):
        return "fp32"
    return "bf16" if flows else "fp16"


def usable_precision(wanted: str, device: torch.device) -> tuple[str, str]:
    """The precision for training on a device, and why it is not the wanted one, or ""."""
    if wanted == "fp16" and device.type == "cpu":
        return "fp32", "precision fp32: fp16 does not train on a CPU"
    on_cuda = wanted == "bf16" and device.type == "cuda"
    if on_cuda and not torch.cuda.is_bf16_supported(including_emulation=False):
        return "fp16", f"precision fp16: {torch.cuda.get_device_name(device)} has no bf16"
    return wanted, ""


def choose_attention(pipeline: DiffusionPipeline) -> str:
    """The attention backend now in use: xformers where CUDA is there and it works, else SDPA.

    Else that is PyTorch's SDPA, followed by the reason why xformers does not work on this GPU.
    """
    if not torch.cuda.is_available():
        return "sdpa"
    try:
        pipeline.enable_xformers_memory_efficient_attention()
    except (ImportError, OSError, ValueError, RuntimeError, NotImplementedError) as error:
        reason = str(error).strip().partition("\n")[0]
        return f"sdpa (no xformers: {reason})"
    return "xformers"


def open_pipeline(base: str, dtype: torch.dtype, memory: MemorySection = FULL) -> DiffusionPipeline:
    """The diffusers pipeline of a base model with all weights."""
    pipeline, source = open_parts(base, dtype, memory)
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module) and is_empty(part):
            setattr(pipeline, name, source.load(name))
    return pipeline


class OneByOne:
    """A source of parts that threads take turns to load from."""

    def __init__(self, source: PartSource):
        self._source = source

    def load(self, name: str) -> Any:
        """A part with its weights in main memory."""
        with _LOADING:
            return self._source.load(name)

    def weights(self, name: str, paths: Sequence[str]) -> list[Tensor] | None:
        """The weights of a part's layers, None where they cannot be read alone."""
        return self._source.weights(name, paths)


def open_parts(
    base: str, dtype: torch.dtype, memory: MemorySection = FULL
) -> tuple[Any, PartSource]:
    """The diffusers pipeline of a base model, and the source of the weights that it lacks."""
    with _LOADING:
        pipeline, source = _open(base, dtype, memory)
    return pipeline, OneByOne(source)


def _open(base: str, dtype: torch.dtype, memory: MemorySection) -> tuple[Any, PartSource]:
    if base == "pocket":
        return _from_folder(POCKET, dtype, memory)
    file, whole = denoiser_and_whole(base)
    if file is not None:
        return _with_denoiser(file, whole, dtype, memory)
    path = user_path(base)
    if path.suffix.lower() in PICKLES:
        raise BackboneError(
            f"{path} is a pickle, which can run code when opened. "
            "Convert it to .safetensors on a machine you can lose, then pass that file."
        )
    if path.is_dir():
        return _from_folder(path, dtype, memory)
    if path.is_file():
        from rite_diffusion.backbones.single_file import SingleFile, load_single_file

        return load_single_file(path, dtype=dtype), SingleFile(path, dtype)
    return _from_hub(base, dtype, memory)


class DenoiserFile:
    """The parts of a model's folder, with the denoiser of a file."""

    def __init__(self, file: Path, whole: str, folder: DiffusersFolder, options: dict[str, Any]):
        self._file, self._whole, self._folder, self._options = file, whole, folder, options

    def load(self, name: str) -> Any:
        """A part with its weights in main memory; BackboneError where the file does not fit."""
        if name != "transformer":
            return self._folder.load(name)
        try:
            return denoiser_class(self._whole).from_single_file(
                str(self._file), config=self._whole, subfolder="transformer", **self._options
            )
        except UNREADABLE as error:
            reason = str(error).strip().splitlines()[0]
            raise BackboneError(
                f"{self._file} does not fit {self._whole}'s denoiser: {reason}"
            ) from None

    def weights(self, name: str, paths: Sequence[str]) -> list[Tensor] | None:
        """None: the file may be in another layout."""
        return None


def _with_denoiser(
    file: Path, whole: str, dtype: torch.dtype, memory: MemorySection
) -> tuple[Any, PartSource]:
    """A model with the denoiser of a file, in the original layout or diffusers'.

    Of the model's own denoiser only the configuration is read.
    """
    name = pipeline_name(whole)
    if name not in FAMILIES or not is_flow(whole):
        raise BackboneError(
            f"{whole} is not a flow transformer's folder or hub id, whose other parts could go "
            f"with {file.name}."
        )
    if not file.is_file():
        raise BackboneError(f"{file} does not exist.")
    source = str(user_path(whole)) if user_path(whole).is_dir() else whole
    kind = getattr(diffusers, name)
    where = Path(source) if Path(source).is_dir() else _download(kind, source, transformer=None)
    quantisation = denoiser_quantisation(memory.weights, dtype, family_class(name).ends)
    options = {"torch_dtype": dtype, "quantization_config": quantisation}
    folder = DiffusersFolder(where, kind, dtype, memory)
    parts = DenoiserFile(file, source, folder, options)
    return folder.pipeline(transformer=parts.load("transformer")), parts


def _from_folder(folder: Path, dtype: torch.dtype, memory: MemorySection) -> tuple[Any, PartSource]:
    index = folder / "model_index.json"
    if not index.is_file():
        raise BackboneError(
            f"{folder} has no model_index.json: it is not a diffusers model. "
            "Pass a folder written by save_pretrained, or a .safetensors file."
        )
    kind = _pipeline_class(str(folder), index)
    try:
        source = DiffusersFolder(folder, kind, dtype, memory)
        return source.pipeline(), source
    except UNREADABLE as error:
        raise BackboneError(f"{folder} does not open as Stable Diffusion: {error}") from None


def _pipeline_class(base: str, index: Path) -> type[DiffusionPipeline]:
    """The pipeline that a model_index.json calls for; BackboneError for foreign classes or code."""
    try:
        parts = json.loads(index.read_text(encoding="utf-8"))
        name = parts["_class_name"]
        libraries = {library for value in parts.values() for library in _library_of(value)}
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise BackboneError(f"{index} cannot be read ({error}): get the model again") from None
    if not isinstance(name, str) or name not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise BackboneError(f"{base} is a {name}; this toolkit opens {known}")
    if not libraries <= LIBRARIES:
        foreign = ", ".join(sorted(str(each) for each in libraries - LIBRARIES))
        raise BackboneError(f"{base} needs code from {foreign}, which is never run")
    return getattr(diffusers, name)


def _library_of(entry: Any) -> list[str | None]:
    """The library of a part, which is listed as [library, class]; nothing of other entries."""
    is_part = isinstance(entry, list) and len(entry) == 2
    return entry[:1] if is_part and all(isinstance(e, str | None) for e in entry) else []


def _from_hub(name: str, dtype: torch.dtype, memory: MemorySection) -> tuple[Any, PartSource]:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError
    from huggingface_hub.utils import validate_repo_id

    remedy = "Pass 'pocket', a diffusers folder, a .safetensors file or a hub id (owner/model)."
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise BackboneError(f"no base model '{name}'. {remedy}") from None
    if "/" not in name:
        raise BackboneError(f"no base model '{name}'. {remedy}")
    try:
        kind = _pipeline_class(name, Path(hf_hub_download(name, "model_index.json")))
        source = DiffusersFolder(_download(kind, name), kind, dtype, memory)
        return source.pipeline(), source
    except GatedRepoError:
        raise BackboneError(
            f"base model '{name}' is gated: accept its licence at https://huggingface.co/{name}, "
            "log in with `hf auth login`, and try again."
        ) from None
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BackboneError(
            f"base model '{name}' is neither here nor on the hub ({reason}). {remedy}"
        ) from None


def _download(kind: type[DiffusionPipeline], name: str, **left_out: None) -> Path:
    """The folder of a hub model in the cache, downloaded without the parts `left_out`."""
    options = options_of(kind) | left_out
    return Path(kind.download(name, use_safetensors=True, **options))
