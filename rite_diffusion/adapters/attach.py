"""LoRA layers and learned words into a base model and out; the base's own weights never change.

PEFT makes the layers. Several adapters live side by side, each with its own weight, which scales
its layers and never its words.
"""

import re
import warnings
from dataclasses import replace

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from rite_diffusion.adapters.adapter import Adapter
from rite_diffusion.adapters.dialects.peft import config_of
from rite_diffusion.adapters.dora import DoraUp, make_dora
from rite_diffusion.adapters.learned_embeddings import (
    add_embeddings,
    check_embeddings,
    remove_embeddings,
)
from rite_diffusion.adapters.names import PREFIXES, module_name, split_path
from rite_diffusion.adapters.shifts import (
    add_shifts,
    check_shifts,
    has_shifts,
    norm_names,
    remove_shifts,
    set_shift_weight,
)
from rite_diffusion.backbones.protocols import Backbone
from rite_diffusion.errors import AdapterError
from rite_diffusion.types import LoraPair

OTHER_BASE_BITS = 8  # more of a fingerprint's 64 bits than rounding or fine-tuning change


def _inner(component: nn.Module, path: str) -> nn.Module:
    """The module at a path, or the layer that LoRA wraps there."""
    module = component.get_submodule(path)
    return module.base_layer if isinstance(module, LoraLayer) else module


def _weight(layer: nn.Module) -> nn.Parameter:
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    return weight


def places(backbone: Backbone) -> dict[str, tuple[str, str]]:
    """Module name in files -> (component, path) of every layer that LoRA can adapt."""
    return {
        module_name(component, path): (component, path)
        for component, module in backbone.components.items()
        for path, layer in _layers(module)
        if isinstance(layer, nn.Linear | nn.Conv2d)
    }


def base_layers(backbone: Backbone) -> list[tuple[str, str]]:
    """Component and path of every layer and norm, CLIP's paths with their `text_model` level."""
    return [split_path(name) for name in (*places(backbone), *norm_names(backbone))]


def base_weights(backbone: Backbone) -> dict[str, Tensor]:
    """Module name in files -> the base's own weight, of every layer that LoRA can adapt."""
    return {
        name: _weight(_inner(backbone.components[component], path)).detach()
        for name, (component, path) in places(backbone).items()
    }


def _layers(component: nn.Module) -> list[tuple[str, nn.Module]]:
    """Paths and layers of a component as they were before any LoRA was put in."""
    found = []
    for path, module in component.named_modules():
        if isinstance(module, LoraLayer):
            found.append((path, module.base_layer))
        elif not any(part in path for part in (".lora_", ".base_layer")):
            found.append((path, module))
    return found


def _inject(config: LoraConfig, component: nn.Module, name: str) -> None:
    with warnings.catch_warnings():  # that a second adapter joins a first is what is wanted
        warnings.filterwarnings("ignore", "Already found a `peft_config`")
        inject_adapter_in_model(config, component, adapter_name=name)


def inject(
    backbone: Backbone, name: str, targets: dict[str, list[str]], rank: int, alpha: float
) -> None:
    """Add fresh trainable LoRA layers, `down` random and `up` zero, at paths per component."""
    for component, paths in targets.items():
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,  # pyright: ignore[reportArgumentType] (PEFT takes floats)
            target_modules=paths,
            init_lora_weights="gaussian",
        )
        _inject(config, backbone.components[component], name)
    for layer in lora_layers(backbone, name).values():  # fp32 over a base in half precision too
        layer.lora_A[name].float()
        layer.lora_B[name].float()


def lora_layers(backbone: Backbone, name: str) -> dict[str, LoraLayer]:
    """Module name -> the LoRA layer there that holds the adapter `name`."""
    return {
        module_name(component, path): module
        for component, root in backbone.components.items()
        for path, module in root.named_modules()
        if isinstance(module, LoraLayer) and name in module.lora_A
    }


def read_pairs(backbone: Backbone, name: str) -> list[LoraPair]:
    """The factors of an attached adapter: the live parameters, not copies."""
    return [_read(module, layer, name) for module, layer in lora_layers(backbone, name).items()]


def _read(module: str, layer: LoraLayer, name: str) -> LoraPair:
    down, up = layer.lora_A[name], layer.lora_B[name]
    if isinstance(up, DoraUp):
        return LoraPair(module, _weight(down), _weight(up), up.scale, up.magnitude)
    return LoraPair(module, _weight(down), _weight(up), layer.lora_alpha[name] / layer.r[name])


def check_fit(backbone: Backbone, adapter: Adapter) -> dict[str, tuple[str, str]]:
    """Where each pair belongs; AdapterError where the adapter was not made for this model."""
    known = places(backbone)
    missing = [pair.name for pair in adapter.pairs if pair.name not in known]
    if missing:
        raise AdapterError(
            f"{len(missing)} of {len(adapter.pairs)} modules of the adapter are not in "
            f"{backbone.name} (first: {missing[0]}): it was made for another kind of base model"
            + (f", {adapter.info.base}." if adapter.info.base else ".")
        )
    for pair in adapter.pairs:
        component, path = known[pair.name]
        weight = _weight(_inner(backbone.components[component], path))
        shape = (pair.up.shape[0], *pair.down.shape[1:])
        if without_ones(shape) != without_ones(tuple(weight.shape)):
            raise AdapterError(
                f"{pair.name} is for weights {shape}, {backbone.name} has {tuple(weight.shape)}: "
                f"the adapter was made for another base model ({adapter.info.base or 'unnamed'})."
            )
    return {pair.name: known[pair.name] for pair in adapter.pairs}


def without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A weight's shape; a matrix and a 1x1 convolution have the same."""
    return shape[:2] if shape[2:] == (1, 1) else shape


def check_base(backbone: Backbone, adapter: Adapter) -> None:
    """AdapterError, with both names, where the adapter was trained on another base model.

    A model that was fine-tuned from the adapter's base counts as that base.
    """
    made_for = adapter.info.base_fingerprint
    if is_other_base(made_for, backbone.fingerprint):
        raise AdapterError(
            f"the adapter was trained on '{adapter.info.base}' ({made_for}), this base is "
            f"'{backbone.name}' ({backbone.fingerprint}): pass the first as the base, or accept "
            "the second with --other-base."
        )


def is_other_base(one: str, other: str) -> bool:
    """Whether two fingerprints are of models that have nothing to do with each other.

    An empty one, of a file that does not say, fits every model.
    """
    return bool(one and other) and _differing_bits(one, other) > OTHER_BASE_BITS


def _differing_bits(one: str, other: str) -> int:
    """In how many of 64 bits two fingerprints differ; all, where one is none."""
    if not all(re.fullmatch(r"[0-9a-f]{16}", each) for each in (one, other)):
        return 0 if one == other else 64
    return (int(one, 16) ^ int(other, 16)).bit_count()


@torch.no_grad()
def attach(backbone: Backbone, adapter: Adapter, name: str, weight: float = 1.0) -> None:
    """Put an adapter into the model under a name, at a weight; all attached adapters add up.

    Everything is checked first: an AdapterError leaves the model as it was.
    """
    if not name.isidentifier():
        raise AdapterError(f"adapter name {name!r} is not a plain word")
    words = {word.adapter for word in backbone.embeddings.values()}
    if lora_layers(backbone, name) or name in words or has_shifts(backbone, name):
        raise AdapterError(f"an adapter named '{name}' is attached already")
    homes = check_fit(backbone, adapter)
    check_shifts(backbone, adapter.shifts)
    check_embeddings(backbone, adapter)
    for component in PREFIXES:
        here = [_injected(pair) for pair in adapter.pairs if homes[pair.name][0] == component]
        if here:
            config = config_of(here, [homes[pair.name][1] for pair in here])
            _inject(LoraConfig(**config), backbone.components[component], name)
    layers = lora_layers(backbone, name)
    for pair in adapter.pairs:
        layer = layers[pair.name]
        _copy(_weight(layer.lora_A[name]), pair.down)
        _copy(_weight(layer.lora_B[name]), pair.up)
        if pair.magnitude is not None:
            make_dora(layer, name, pair)
    add_shifts(backbone, adapter.shifts, name)
    add_embeddings(backbone, adapter, name)
    backbone.triggers[name] = adapter.info.triggers()
    set_weight(backbone, name, weight)
    _activate(backbone)


def _injected(pair: LoraPair) -> LoraPair:
    """The pair as PEFT is to hold it: a DoRA's scale is within its own layers."""
    return pair if pair.magnitude is None else replace(pair, scale=1.0, magnitude=None)


def _copy(parameter: nn.Parameter, value: Tensor) -> None:
    parameter.copy_(value.reshape(parameter.shape))
    parameter.requires_grad_(False)


def set_weight(backbone: Backbone, name: str, weight: float) -> None:
    """Change the weight of an attached adapter."""
    for layer in lora_layers(backbone, name).values():
        layer.set_scale(name, weight)
    set_shift_weight(backbone, name, weight)


def _activate(backbone: Backbone) -> None:
    """Make every attached adapter count."""
    for root in backbone.components.values():
        for module in root.modules():
            if isinstance(module, LoraLayer):
                module.set_adapter(list(module.lora_A), inference_mode=True)


def detach(backbone: Backbone, name: str) -> None:
    """Take an adapter out; a layer that holds no other becomes the base's own again."""
    for root in backbone.components.values():
        wrapped = [(p, m) for p, m in root.named_modules() if isinstance(m, LoraLayer)]
        for path, module in wrapped:
            if name in module.lora_A:
                module.delete_adapter(name)
            if not module.lora_A:
                parent, _, leaf = path.rpartition(".")
                setattr(root.get_submodule(parent), leaf, module.base_layer)
        configs = getattr(root, "peft_config", {})
        configs.pop(name, None)
        if not configs and wrapped:
            del root.peft_config
    remove_shifts(backbone, name)
    remove_embeddings(backbone, name)
    backbone.triggers.pop(name, None)
    _activate(backbone)
