"""The settings of `[memory]` on a base: weights in 8 or 4 bits, and weights in main memory.

Other libraries do all of it: torchao and bitsandbytes quantise, through diffusers and transformers,
while weights are read; diffusers and accelerate move them between devices.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from rite_diffusion.config import MemorySection
from rite_diffusion.errors import ConfigError
from rite_diffusion.files.writing import user_path

EXTRAS = {  # storage -> the package that it needs, and this package's extra that installs it
    "int8": ("torchao", "memory"),
    "fp8": ("torchao", "memory"),
    "nf4": ("bitsandbytes", "nf4"),
}


def check_memory(memory: MemorySection, base: str, device: torch.device) -> None:
    """Raise ConfigError, before anything is loaded, for settings that cannot be followed here."""
    if memory.weights == "auto":
        raise ConfigError("memory.weights = auto is for a training: choose full, int8, fp8 or nf4.")
    for key in ("weights", "encoder_weights"):
        wanted = getattr(memory, key)
        if wanted != "full":
            _check_storage(f"memory.{key} = {wanted}", wanted, base, device)
    if memory.offload == "model" and device.type == "cpu":
        raise ConfigError("memory.offload = model: this machine computes in main memory anyway.")
    if memory.offload == "layers" and memory.weights == "nf4":
        raise ConfigError("memory.offload = layers: nf4 weights stay on the GPU. Use int8 or fp8.")


def _check_storage(setting: str, wanted: str, base: str, device: torch.device) -> None:
    package, extra = EXTRAS[wanted]
    if user_path(base).is_file():
        raise ConfigError(
            f"{setting}: {base} is a single file, whose weights are kept in full. Pass the model's "
            "hub id or diffusers folder."
        )
    if wanted == "nf4" and device.type != "cuda":
        raise ConfigError(f"{setting} needs a CUDA GPU, and this is {device.type}. Use int8.")
    if find_spec(package) is None:
        raise ConfigError(f"{setting} needs {package}: pip install 'rite-diffusion[{extra}]'")


# --- quantised weights -------------------------------------------------------------------------


def denoiser_quantisation(wanted: str, dtype: torch.dtype, whole: Sequence[str]) -> Any:
    """Diffusers' configuration of the denoiser's quantisation; None for full weights.

    The layers at the paths `whole` keep their full weights, which the base's fingerprint reads.
    """
    import diffusers

    if wanted == "full":
        return None
    if wanted == "nf4":
        return diffusers.BitsAndBytesConfig(**_nf4(dtype), llm_int8_skip_modules=list(whole))
    names = [f"{path}.weight" for path in whole]  # other forms would match within longer paths
    return diffusers.TorchAoConfig(_torchao(wanted), modules_to_not_convert=names)


def encoder_quantisation(wanted: str, dtype: torch.dtype) -> Any:
    """Transformers' configuration of a text encoder's quantisation; None for full weights."""
    import transformers

    if wanted == "full":
        return None
    if wanted == "nf4":
        return transformers.BitsAndBytesConfig(**_nf4(dtype))
    return transformers.TorchAoConfig(_torchao(wanted))


def _nf4(dtype: torch.dtype) -> dict[str, Any]:
    """NormalFloat in 4 bits (Dettmers et al. 2023, Sec. 3), computing in `dtype`."""
    options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
    return {"load_in_4bit": True} | options


def _torchao(wanted: str) -> Any:
    """Torchao's configuration: 8 bits and a scale for every output of a layer."""
    from torchao.quantization import (  # pyright: ignore[reportMissingImports] (an extra)
        Float8WeightOnlyConfig,
        Int8WeightOnlyConfig,
    )

    return {"int8": Int8WeightOnlyConfig, "fp8": Float8WeightOnlyConfig}[wanted]()


def part_quantisation(memory: MemorySection, kind: Any, name: str, dtype: torch.dtype) -> Any:
    """The libraries' configuration for a part of a backbone class; None for full weights."""
    if name == kind.denoiser_name:
        return denoiser_quantisation(memory.weights, dtype, kind.ends)
    return None if name == "vae" else encoder_quantisation(memory.encoder_weights, dtype)


def stored_tensors(weight: Tensor) -> list[Tensor]:
    """What is stored of a weight: values and scales of a quantised one, else the weight itself."""
    if not is_traceable_wrapper_subclass(weight):
        return [weight]
    names, _ = weight.__tensor_flatten__()
    return [each for name in names for each in stored_tensors(getattr(weight, name))]


def is_quantised(layer: nn.Module) -> bool:
    """Whether a layer's weight is stored in 8 or 4 bits."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return is_traceable_wrapper_subclass(weight) or not weight.is_floating_point()


# --- weights in main memory --------------------------------------------------------------------


def offload_layers(denoiser: nn.Module, device: torch.device) -> None:
    """Keep the weights of linear layers in main memory; each is on the device while it runs.

    Norms and convolutions stay on the device: autograd refers to their weights, not to copies, so
    they must not move before the backward pass. Streams are not used: diffusers prefetches in the
    order of the forward pass, which is wrong for activations that are computed again.
    """
    from accelerate.utils import named_module_tensors, set_module_tensor_to_device
    from diffusers.hooks import apply_group_offloading

    for module in denoiser.modules():
        if isinstance(module, nn.Linear):
            apply_group_offloading(module, onload_device=device, offload_type="leaf_level")
            continue
        for name, _ in list(named_module_tensors(module)):
            set_module_tensor_to_device(module, name, device)


def offload_models(models: Sequence[nn.Module], device: torch.device) -> None:
    """Keep models in main memory; each comes to the device when it runs, and the others leave."""
    from accelerate.hooks import CpuOffload, UserCpuOffloadHook, add_hook_to_module

    for model in models:
        for other in models:
            if other is not model:
                leaving = UserCpuOffloadHook(other, CpuOffload(device))
                add_hook_to_module(model, CpuOffload(device, leaving), append=True)
