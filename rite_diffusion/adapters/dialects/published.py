"""Weights published as pickles: Mix-of-Show, Custom Diffusion, and A1111's old embeddings.

They are opened only on request, by PyTorch's restricted unpickler, which rebuilds tensors and
plain containers and refuses everything that could run code.

    Mix-of-Show       {"params": {"new_concept_embedding": {word: (layers, width)},
                      "unet" and "text_encoder": {<path>.lora_down.weight: …}}}; no alpha is stored:
                      the scale is 1
    Custom Diffusion  {<path>.attn2.processor.to_k_custom_diffusion.weight: (out, in)} (diffusers)
                      or {"state_dict": {model.diffusion_model.<SGM path>.weight: (out, in)},
                      "embed": (vectors, width)}: whole weights, so the base is needed
    A1111             {"string_to_param": {"*": (vectors, width)}, "name": word}
    embeddings        {word: (width,) or (vectors, width)}, or {"clip_l": …, "clip_g": …} for SDXL
"""

import pickle
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rite_diffusion.adapters.adapter import Adapter, AdapterInfo
from rite_diffusion.adapters.dialects import interpret, locate
from rite_diffusion.adapters.dialects.embeddings import split_tokens
from rite_diffusion.adapters.storage import read_tensors
from rite_diffusion.errors import AdapterError
from rite_diffusion.files.writing import reading

_SGM = "model.diffusion_model."
_CUSTOM = re.compile(r"\.processor\.(to_[qkv]|to_out)_custom_diffusion(\.0)?\.weight$")


def load_published(path: Path, base_weights: Mapping[str, Tensor] | None) -> Adapter:
    """The adapter in a published pickle.

    `base_weights`, by module name, are needed for files of whole weights. AdapterError where the
    pickle holds anything but tensors and containers, or has an unknown layout.
    """
    content = _restricted(path)
    try:
        if isinstance(content.get("params"), dict):
            return _mix_of_show(content["params"], path.stem)
        if "string_to_param" in content:
            return _a1111(content, path.stem)
        return _custom_diffusion(content, path.stem, base_weights)
    except AdapterError as error:
        raise AdapterError(f"{path}: {error}.") from None


def _restricted(path: Path) -> dict[str, Any]:
    """The pickle's content, read without running code."""
    if not path.is_file():
        raise AdapterError(f"no adapter file {path}. Pass the path of a published .pth or .bin.")
    try:
        if path.suffix == ".safetensors":
            return dict(read_tensors(path)[0])
        # Old textual inversions hold their vectors in a ParameterDict, a container of tensors.
        safe = torch.serialization.safe_globals([nn.ParameterDict])
        with reading(path, AdapterError), path.open("rb") as stream, safe:
            content = torch.load(stream, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "cut off"
        raise AdapterError(
            f"{path} holds more than tensors, or is damaged: refused ({reason})."
        ) from None
    if not isinstance(content, dict):
        raise AdapterError(f"{path} holds a {type(content).__name__}, not weights by name.")
    return content


def _tensors(table: Any) -> dict[str, Tensor]:
    """The table's tensors, detached; AdapterError where an entry is not a tensor."""
    if not isinstance(table, Mapping | nn.ParameterDict):
        raise AdapterError(f"it holds a {type(table).__name__} where weights by name should be")
    odd = [key for key, value in table.items() if not isinstance(value, Tensor)]
    if odd:
        raise AdapterError(f"{len(odd)} of its {len(table)} entries are not tensors ({odd[0]!r})")
    return {str(key): value.detach() for key, value in table.items()}


def _mix_of_show(params: Mapping[str, Any], word: str) -> Adapter:
    tensors = {
        f"{component}.{key}": value
        for component in ("unet", "text_encoder")
        for key, value in _tensors(params.get(component, {})).items()
    }
    for name, rows in _tensors(params.get("new_concept_embedding", {})).items():
        tensors[f"tokens.{name}"] = rows.unsqueeze(1)  # (layers, 1, width)
    return _named(interpret(tensors, {}, word, {}), "Mix-of-Show")


def _a1111(content: Mapping[str, Any], word: str) -> Adapter:
    rows = _tensors(content["string_to_param"])
    if len(rows) != 1:
        raise AdapterError(f"it holds {len(rows)} embeddings ({', '.join(rows)}) instead of one")
    [value] = rows.values()
    tensors = {f"tokens.{content.get('name') or word}": value}
    return _named(interpret(tensors, {}, word, {}), "A1111 embedding")


def _custom_diffusion(
    content: Mapping[str, Any], word: str, base_weights: Mapping[str, Tensor] | None
) -> Adapter:
    whole = _tensors(content.get("state_dict", content))
    if not split_tokens(whole, word)[1] and "embed" not in content:
        return _named(interpret(whole, {}, word, {}), "embedding")
    tensors: dict[str, Tensor] = {}
    for key, weight in whole.items():
        if re.fullmatch(r"<[^<>]+>", key):
            tensors[key] = weight
        elif key.startswith(_SGM) or _CUSTOM.search(key):
            stem = _CUSTOM.sub(r".\1\2", key) if _CUSTOM.search(key) else key[len("model.") :]
            tensors[stem.removesuffix(".weight") + ".diff"] = weight
        else:
            raise AdapterError(f"{len(whole)} tensors of no known layout (first: {key[:120]!r})")
    if isinstance(content.get("embed"), Tensor):
        tensors[f"tokens.{word}"] = content["embed"].detach()
    return _named(interpret(_differences(tensors, base_weights), {}, word, {}), "Custom Diffusion")


def _differences(
    tensors: Mapping[str, Tensor], base_weights: Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    """The tensors, where whole weights (`.diff`) are replaced by differences from the base's."""
    result = {}
    for key, value in tensors.items():
        place = locate(key) if key.endswith(".diff") else None
        if place is None:
            result[key] = value
            continue
        if base_weights is None:
            raise AdapterError(
                "it holds whole weights: pass the base model that they were trained on with --base"
            )
        base = base_weights.get(place[1])
        if base is None or base.shape != value.shape:
            raise AdapterError(f"{place[1]} {tuple(value.shape)} is not in the base model")
        result[key] = value.float() - base.detach().float().cpu()
    return result


def _named(adapter: Adapter, layout: str) -> Adapter:
    return replace(adapter, info=AdapterInfo(), dialect=layout)
