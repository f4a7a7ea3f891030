"""Verification of exports: loaded back by the target's rules or code, compared to the original."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from rite_diffusion.adapters.adapter import Adapter
from rite_diffusion.adapters.delta import delta_weight, relative_difference
from rite_diffusion.adapters.dialects import comfyui, kohya
from rite_diffusion.adapters.dialects.peft import path_of
from rite_diffusion.adapters.families import family_of
from rite_diffusion.adapters.flow_rules import read_original
from rite_diffusion.adapters.names import PREFIXES, dotted, module_name, split_name
from rite_diffusion.adapters.native import known_family
from rite_diffusion.adapters.rules import (
    Layer,
    Reading,
    comfyui_map,
    diffusers_map,
    kohya_map,
    published_layers,
    read_by_map,
)
from rite_diffusion.adapters.storage import read_tensors
from rite_diffusion.errors import AdapterError
from rite_diffusion.types import LoraPair

MAPS = {"kohya": kohya_map, "comfyui": comfyui_map, "diffusers": diffusers_map}
# Largest relative difference of a delta W: files round the factors to this precision.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@dataclass(frozen=True)
class Verification:
    """The result of loading an export back."""

    reader: str  # whose rules or code read it
    modules: int
    difference: float  # largest relative difference of a module's delta W


def check_family(adapter: Adapter, target: str) -> None:
    """AdapterError where the target's names depend on the family of the base, which is unknown."""
    stem_of = {"kohya": kohya.stem_of, "comfyui": comfyui.stem_of}.get(target)
    if adapter.is_of_flow and stem_of is not None:
        known_family(adapter)
        return
    if stem_of is None or family_of(adapter) is not None:
        return
    unclear = [n for n in adapter.names() if stem_of(n, "sd") != stem_of(n, "sdxl")]
    if unclear:
        raise AdapterError(
            f"{target} has other names for {len(unclear)} of {len(adapter.names())} modules in "
            f"Stable Diffusion 1 and 2 than in XL (first: {unclear[0]}), and the file does not "
            "state its base model: pass it with --base."
        )


def verify_by_map(
    original: Adapter, path: Path, target: str, layers: Iterable[Layer] | None = None
) -> Verification:
    """Read the file by the target's map of `layers`, by default those of the published models.

    AdapterError where a tensor is not read, or the update differs from the original's.
    """
    if original.is_of_flow:
        return _verify_flow(original, path, target)
    family = family_of(original) or "sd"
    known = MAPS[target](layers or published_layers(family), family)
    tensors, _ = read_tensors(path)
    read = read_by_map(tensors, known)
    if read.skipped:
        raise AdapterError(
            f"{target} knows no layer for {len(read.skipped)} of the {len(tensors)} tensors "
            f"(first: {read.skipped[0]}): the adapter's base is not laid out like Stable Diffusion "
            "1, 2 or XL."
        )
    _compare_vectors(original, read, target)
    pairs = {module_name(*layer): pair for layer, pair in read.pairs.items()}
    return compare(original, pairs, f"{target}'s map of names")


def _verify_flow(original: Adapter, path: Path, target: str) -> Verification:
    """The same for a flow transformer, whose layers may be fused in the file."""
    tensors, _ = read_tensors(path)
    pairs = [(dotted(split_name(pair.name)[1]), pair) for pair in original.pairs]
    family = known_family(original) if target != "diffusers" else ""
    read = read_original(tensors, family, target, pairs)
    worst = max(relative_difference(read[path], delta_weight(pair)) for path, pair in pairs)
    if not worst <= TOLERANCE[original.dtype]:
        raise AdapterError(
            f"{target} reads the update with a relative difference of {worst:.2g}: the export "
            "would not act as the original and was not written."
        )
    return Verification(f"{target}'s map of names", len(pairs), worst)


def _compare_vectors(original: Adapter, read: Reading, target: str) -> None:
    """AdapterError unless all differences of biases and norms are bitwise equal."""
    found = {(module_name(*layer), part): v for (layer, part), v in read.vectors.items()}
    wanted = {(shift.name, shift.parameter): shift.values for shift in original.shifts}
    same = found.keys() == wanted.keys()
    if not same or not all(torch.equal(found[place], wanted[place]) for place in wanted):
        raise AdapterError(f"{target} reads other biases or norms: the export was not written.")


def verify_in_peft(original: Adapter, folder: Path) -> Verification:
    """Load the folders with PEFT into empty layers of the adapter's shapes, and compare."""
    found: dict[str, LoraPair] = {}
    for component in PREFIXES:
        pairs = {path_of(p.name): p for p in original.pairs if split_name(p.name)[0] == component}
        if pairs:
            model = PeftModel.from_pretrained(_bare_model(pairs), str(folder / component))
            found |= attached_pairs({component: model.get_base_model()})
    return compare(original, found, "PEFT")


def verify_in_diffusers(original: Adapter, path: Path, pipeline: Any) -> Verification:
    """Load the file with a diffusers pipeline's own loader, and compare."""
    pipeline.load_lora_weights(str(path.parent), weight_name=path.name, use_safetensors=True)
    parts = {name: getattr(pipeline, name) for name in PREFIXES if name in pipeline.components}
    found = attached_pairs(parts)
    pipeline.unload_lora_weights()
    return compare(original, found, type(pipeline).__name__)


def _bare_model(pairs: Mapping[str, LoraPair]) -> nn.Module:
    """A module with a layer of each pair's shape at the pair's path."""
    root = nn.Module()
    for path, pair in pairs.items():
        *parents, leaf = path.split(".")
        module = root
        for name in parents:
            if name not in dict(module.named_children()):
                module.add_module(name, nn.Module())
            module = module.get_submodule(name)
        module.add_module(leaf, _bare_layer(pair))
    return root


def _bare_layer(pair: LoraPair) -> nn.Module:
    outputs, inputs = pair.up.shape[0], pair.down.shape[1]
    if pair.down.ndim == 4:
        return nn.Conv2d(inputs, outputs, tuple(pair.down.shape[2:]), bias=False)  # pyright: ignore
    return nn.Linear(inputs, outputs, bias=False)


def attached_pairs(components: Mapping[str, nn.Module]) -> dict[str, LoraPair]:
    """The pairs of the only adapter in the components' PEFT layers, with their current scales."""
    found = {}
    for component, root in components.items():
        for path, layer in root.named_modules():
            if isinstance(layer, LoraLayer) and layer.lora_A:
                [adapter] = layer.lora_A
                name = module_name(component, path)
                norms = layer.lora_magnitude_vector
                found[name] = LoraPair(
                    name,
                    _weight(layer.lora_A, adapter),
                    _weight(layer.lora_B, adapter),
                    layer.scaling[adapter],
                    _weight(norms, adapter).flatten() if adapter in norms else None,
                )
    return found


def _weight(layers: nn.ModuleDict, adapter: str) -> Tensor:
    weight = layers[adapter].weight
    assert isinstance(weight, Tensor)
    return weight.detach().float().cpu()


def compare(original: Adapter, found: Mapping[str, LoraPair], reader: str) -> Verification:
    """Compare delta W and norms module by module; AdapterError where one is missing or differs."""
    names = set(original.names())
    missing, extra = sorted(names - found.keys()), sorted(found.keys() - names)
    if missing or extra:
        raise AdapterError(
            f"{reader} finds {len(found)} of {len(names)} modules in the export "
            f"(first difference: {(missing + extra)[0]}): it was not written."
        )
    differences = {pair.name: _difference(found[pair.name], pair) for pair in original.pairs}
    worst = max(differences, key=lambda name: differences[name], default="")
    largest = differences.get(worst, 0.0)
    if not largest <= TOLERANCE[original.dtype]:
        raise AdapterError(
            f"{reader} reads {worst} with a relative difference of {largest:.2g}: the export would "
            "not act as the original and was not written."
        )
    return Verification(reader, len(names), largest)


@torch.no_grad()
def _difference(found: LoraPair, wanted: LoraPair) -> float:
    target = delta_weight(wanted)
    difference = relative_difference(delta_weight(found).reshape(target.shape), target)
    if (found.magnitude is None) != (wanted.magnitude is None):
        return 1.0
    if found.magnitude is None or wanted.magnitude is None:
        return difference
    return max(difference, relative_difference(found.magnitude, wanted.magnitude))
