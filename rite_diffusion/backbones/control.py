"""ControlNets and T2I-Adapters: networks that guide a base model by a condition picture."""

import json
from pathlib import Path

import torch
from diffusers import ControlNetModel, T2IAdapter
from torch import nn

from rite_diffusion.errors import BackboneError
from rite_diffusion.files.writing import user_path

ControlNetwork = ControlNetModel | T2IAdapter
KINDS: dict[str, type[ControlNetwork]] = {
    "ControlNetModel": ControlNetModel,
    "T2IAdapter": T2IAdapter,
}


def load_control_network(source: str, dtype: torch.dtype, device: torch.device) -> ControlNetwork:
    """The network in a diffusers folder or behind a hub id, frozen.

    Pickles are not opened. BackboneError where there is no such network.
    """
    try:
        kind = _kind(source)
        network = kind.from_pretrained(source, torch_dtype=dtype, use_safetensors=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BackboneError(
            f"no ControlNet or T2I-Adapter '{source}' ({reason}). Pass a diffusers folder with "
            "config.json and .safetensors weights, or a hub id (owner/model)."
        ) from None
    assert isinstance(network, ControlNetModel | T2IAdapter)
    network.requires_grad_(False).eval()
    nn.Module.to(network, device)  # diffusers' own `to` is not typed
    return network


def _kind(source: str) -> type[ControlNetwork]:
    """The class that a network's config.json names; ValueError for any other."""
    folder = user_path(source)
    if folder.is_dir():
        config = folder / "config.json"
    else:
        from huggingface_hub import hf_hub_download

        config = Path(hf_hub_download(source, "config.json"))
    name = json.loads(config.read_text(encoding="utf-8")).get("_class_name")
    if name not in KINDS:
        raise ValueError(f"it is a {name}; this toolkit opens {', '.join(KINDS)}")
    return KINDS[name]
