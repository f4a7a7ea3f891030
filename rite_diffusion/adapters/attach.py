"""Attach adapters to a base model and detach them; the base's own weights never change.

PEFT's LoRA layers wrap the base's layers and hold the factors of all attached adapters; their
outputs add up. An adapter's weight scales its layers and shifts, not its learned embeddings.

PEFT's public calls inject, activate, scale, cast and delete adapters. The factors themselves are
read and written in `lora_A` and `lora_B`: `get_peft_model_state_dict` gives detached copies, and
training needs the parameters; `set_peft_model_state_dict` skips names that it does not know.
"""

import re
import warnings
from dataclasses import replace

import torch
from peft import LoraConfig
from peft.functional import (
    cast_adapter_dtype,
    delete_adapter,
    inject_adapter_in_model,
    set_adapter,
)
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
from rite_diffusion.backbones.memory import is_quantised
from rite_diffusion.backbones.protocols import Backbone
from rite_diffusion.errors import AdapterError
from rite_diffusion.types import LoraPair

OTHER_BASE_BITS = 8  # rounding and fine-tuning change at most so many of a fingerprint's 64 bits


def base_layer(module: nn.Module) -> nn.Module:
    """The base's own layer: the module itself, or the layer that LoRA wraps."""
    return module.get_base_layer() if isinstance(module, LoraLayer) else module


def _weight(layer: nn.Module) -> nn.Parameter:
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    return weight


def weight_shape(layer: nn.Module) -> tuple[int, ...]:
    """Shape (out, in, …) of a layer's weight, whose storage may have another."""
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    return tuple(_weight(layer).shape)


def adaptable_layers(backbone: Backbone) -> dict[str, tuple[str, str]]:
    """The layers that LoRA can adapt, as module name in files -> (component, path)."""
    return {
        module_name(component, path): (component, path)
        for component, module in backbone.architecture.items()
        for path, layer in _layers(module)
        if isinstance(layer, nn.Linear | nn.Conv2d)
    }


def base_layers(backbone: Backbone) -> list[tuple[str, str]]:
    """(component, path) of every layer and norm; paths in CLIP include the level `text_model`."""
    return [split_path(name) for name in (*adaptable_layers(backbone), *norm_names(backbone))]


def base_weights(backbone: Backbone) -> dict[str, Tensor]:
    """The base's weights that LoRA can adapt, as module name in files -> weight (out, in, …).

    AdapterError where they are quantised.
    """
    layers = {
        name: base_layer(backbone.components[component].get_submodule(path))
        for name, (component, path) in adaptable_layers(backbone).items()
    }
    if any(is_quantised(layer) for layer in layers.values()):
        raise AdapterError(
            f"{backbone.name} is open with {backbone.memory.weights} weights, and this reads them "
            "in full: open it with weights = full."
        )
    return {name: _weight(layer).detach() for name, layer in layers.items()}


def _layers(component: nn.Module) -> list[tuple[str, nn.Module]]:
    """Paths and modules of a component as they are without any adapter."""
    return [
        (path, base_layer(module))
        for path, module in component.named_modules()
        if not any(part in path for part in (".lora_", ".base_layer"))
    ]


def _inject(config: LoraConfig, component: nn.Module, name: str) -> None:
    with warnings.catch_warnings():  # PEFT warns when a component gets a second adapter
        warnings.filterwarnings("ignore", "Already found a `peft_config`")
        inject_adapter_in_model(config, component, adapter_name=name)


def _adapter_names(component: nn.Module) -> list[str]:
    """Names of a component's adapters in the order in which they were attached."""
    return list(getattr(component, "peft_config", {}))


def inject(
    backbone: Backbone,
    name: str,
    targets: dict[str, list[str]],
    rank: int,
    alpha: float,
    kind: str = "lora",
) -> None:
    """Add trainable LoRA layers to the modules at the `targets`, component -> paths.

    `down` is Gaussian and `up` zero; both are fp32, also over a base in half precision. `kind` is
    lora, rslora (Kalajdzievski 2023: scale = alpha / √rank) or dora (Liu et al. 2024).
    """
    for component, paths in targets.items():
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,  # pyright: ignore[reportArgumentType] (PEFT takes floats)
            target_modules=paths,
            init_lora_weights="gaussian",
            use_rslora=kind == "rslora",
            use_dora=kind == "dora",
        )
        _inject(config, backbone.components[component], name)
        cast_adapter_dtype(backbone.components[component], name)
    _move_factors(backbone, name)


def _move_factors(backbone: Backbone, name: str) -> None:
    """Move an adapter's factors to the base's device; PEFT puts them beside offloaded weights."""
    for layer in lora_layers(backbone, name).values():
        layer.lora_A[name].to(backbone.device)
        layer.lora_B[name].to(backbone.device)


def lora_layers(backbone: Backbone, name: str) -> dict[str, LoraLayer]:
    """The LoRA layers that hold the adapter `name`, by module name in files."""
    return {
        module_name(component, path): module
        for component, root in backbone.components.items()
        for path, module in root.named_modules()
        if isinstance(module, LoraLayer) and name in module.lora_A
    }


def read_pairs(backbone: Backbone, name: str) -> list[LoraPair]:
    """The factors of an attached adapter: the model's parameters themselves, not copies."""
    return [_read(module, layer, name) for module, layer in lora_layers(backbone, name).items()]


def _read(module: str, layer: LoraLayer, name: str) -> LoraPair:
    down, up = layer.lora_A[name], layer.lora_B[name]
    if isinstance(up, DoraUp):
        return LoraPair(module, _weight(down), _weight(up), up.scale, up.magnitude)
    rank = layer.r[name]
    scale = layer.lora_alpha[name] / (rank**0.5 if layer.use_rslora[name] else rank)
    magnitude = None
    if name in layer.lora_magnitude_vector:  # PEFT's own DoRA, in training
        magnitude = _weight(layer.lora_magnitude_vector[name]).flatten()
    return LoraPair(module, _weight(down), _weight(up), scale, magnitude)


def check_fit(backbone: Backbone, adapter: Adapter) -> dict[str, tuple[str, str]]:
    """The (component, path) of each pair, by the pair's name.

    AdapterError where the model lacks a module or has it in another shape.
    """
    known = adaptable_layers(backbone)
    missing = [pair.name for pair in adapter.pairs if pair.name not in known]
    if missing:
        raise AdapterError(
            f"{len(missing)} of {len(adapter.pairs)} modules of the adapter are not in "
            f"{backbone.name} (first: {missing[0]}): it was made for another kind of base model"
            + (f", {adapter.info.base}." if adapter.info.base else ".")
        )
    for pair in adapter.pairs:
        component, path = known[pair.name]
        layer = base_layer(backbone.architecture[component].get_submodule(path))
        shape, own = (pair.up.shape[0], *pair.down.shape[1:]), weight_shape(layer)
        if as_matrix_shape(shape) != as_matrix_shape(own):
            raise AdapterError(
                f"{pair.name} is for weights {shape}, {backbone.name} has {own}: "
                f"the adapter was made for another base model ({adapter.info.base or 'unnamed'})."
            )
        if pair.magnitude is not None and not is_at_hand(backbone, layer):
            raise AdapterError(
                f"{pair.name} is a DoRA layer, whose norms need the weights of {backbone.name}: "
                "open it with weights = full and without offload = layers."
            )
    return {pair.name: known[pair.name] for pair in adapter.pairs}


def is_at_hand(backbone: Backbone, layer: nn.Module) -> bool:
    """Whether a layer's weight is in full and on the device, to compute with."""
    return not is_quantised(layer) and backbone.memory.offload != "layers"


def as_matrix_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A weight's shape; that of a 1x1 convolution is given as a matrix's."""
    return shape[:2] if shape[2:] == (1, 1) else shape


OR_OTHER_BASE = ", or accept the second with --other-base"  # where there is this option


def check_base(
    backbone: Backbone, adapter: Adapter, what: str = "the adapter", remedy: str = ""
) -> None:
    """Raise AdapterError where the adapter was trained on another base model.

    A model that was fine-tuned from the adapter's base counts as the same. The message calls it
    `what`, and ends with `remedy` where another base can be accepted.
    """
    made_for = adapter.info.base_fingerprint
    if is_other_base(made_for, backbone.fingerprint):
        raise AdapterError(
            f"{what} was trained on '{adapter.info.base}' ({made_for}), this base is "
            f"'{backbone.name}' ({backbone.fingerprint}): pass the first as the base{remedy}."
        )


def is_other_base(one: str, other: str) -> bool:
    """Whether two fingerprints belong to unrelated models; an empty one matches every model."""
    return bool(one and other) and _differing_bits(one, other) > OTHER_BASE_BITS


def _differing_bits(one: str, other: str) -> int:
    """Number of bits, of 64, in which two fingerprints differ; 64 where one is not hexadecimal."""
    if not all(re.fullmatch(r"[0-9a-f]{16}", each) for each in (one, other)):
        return 0 if one == other else 64
    return (int(one, 16) ^ int(other, 16)).bit_count()


@torch.no_grad()
def attach(backbone: Backbone, adapter: Adapter, name: str, weight: float = 1.0) -> None:
    """Attach an adapter under a name, at a weight; the updates of all attached adapters add up.

    AdapterError, before the model changes, where the adapter does not fit it or the name is taken.
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
    _move_factors(backbone, name)
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
    """The pair that PEFT is given; a DoRA is injected as a LoRA of scale 1, see `make_dora`."""
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
    """Make every attached adapter act, frozen."""
    for root in backbone.components.values():
        set_adapter(root, _adapter_names(root), inference_mode=True)


def train_beside(backbone: Backbone, frozen: str, trained: str) -> None:
    """Make two adapters act at once, the first without gradients and the second with them."""
    for root in backbone.components.values():
        names = [name for name in (frozen, trained) if name in _adapter_names(root)]
        if names:
            set_adapter(root, names)
    for layer in lora_layers(backbone, frozen).values():
        for factor in (layer.lora_A[frozen], layer.lora_B[frozen]):
            factor.requires_grad_(False)


def detach(backbone: Backbone, name: str) -> None:
    """Remove an adapter; a layer without other adapters is the base's own again."""
    for root in backbone.components.values():
        if name in _adapter_names(root):
            delete_adapter(root, name, prefix="lora_")
            _forget(root, name)
    remove_shifts(backbone, name)
    remove_embeddings(backbone, name)
    backbone.triggers.pop(name, None)
    _activate(backbone)


def _forget(root: nn.Module, name: str) -> None:
    """Unwrap layers without adapters and drop the adapter's configuration from a component.

    PEFT's `delete_adapter` leaves both; its `unload` needs a PeftModel and removes all adapters.
    """
    for path, module in list(root.named_modules()):
        if isinstance(module, LoraLayer) and not module.lora_A:
            root.set_submodule(path, module.get_base_layer())
    configs: dict[str, LoraConfig] = root.peft_config  # pyright: ignore[reportAssignmentType]
    del configs[name]
    if not configs:
        del root.peft_config
