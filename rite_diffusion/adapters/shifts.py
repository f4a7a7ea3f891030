"""Attach and detach shifts of biases and norm weights; the base's own values never change.

A parametrization computes value = base + sum over adapters of weight * difference, so weights can
change at any time and detaching an adapter restores the base exactly.
"""

from collections.abc import Iterator, Sequence

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.utils.parametrize import (
    is_parametrized,
    register_parametrization,
    remove_parametrizations,
)

from rite_diffusion.adapters.names import module_name
from rite_diffusion.backbones.protocols import Backbone
from rite_diffusion.errors import AdapterError
from rite_diffusion.types import Shift


class Shifted(nn.Module):
    """The parametrization of one vector: its differences and their weights, by adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.differences: dict[str, Tensor] = {}
        self.weights: dict[str, float] = {}

    def forward(self, base: Tensor) -> Tensor:
        """The base's vector plus every adapter's difference times its weight."""
        value = base.float()
        for name, difference in self.differences.items():
            value = value + self.weights[name] * difference.to(base.device)
        return value.to(base.dtype)


def modules_of(backbone: Backbone) -> dict[str, nn.Module]:
    """The modules whose bias or norm weight can be shifted, by module name in files."""
    found = {}
    for component, root in backbone.components.items():
        for path, module in root.named_modules():
            inner = module.get_base_layer() if isinstance(module, LoraLayer) else module
            if not any(part in path for part in (".lora_", ".base_layer", "parametrizations")):
                if isinstance(inner, nn.Linear | nn.Conv2d | nn.LayerNorm | nn.GroupNorm):
                    found[module_name(component, path)] = inner
    return found


def norm_names(backbone: Backbone) -> list[str]:
    """Names of the norms, which have vectors only."""
    norms = (nn.LayerNorm, nn.GroupNorm)
    return [name for name, module in modules_of(backbone).items() if isinstance(module, norms)]


def check_shifts(backbone: Backbone, shifts: Sequence[Shift]) -> None:
    """AdapterError where the model lacks a vector or has it in another shape."""
    known = modules_of(backbone) if shifts else {}
    for shift in shifts:
        vector = getattr(known.get(shift.name), shift.parameter, None)
        if vector is None or vector.shape != shift.values.shape:
            raise AdapterError(
                f"{shift.name}'s {shift.parameter} {tuple(shift.values.shape)} is not in "
                f"{backbone.name}: the adapter was made for another base model."
            )


def add_shifts(backbone: Backbone, shifts: Sequence[Shift], name: str) -> None:
    """Attach an adapter's shifts under a name, at weight 1."""
    known = modules_of(backbone) if shifts else {}
    for shift in shifts:
        module = known[shift.name]
        if not is_parametrized(module, shift.parameter):
            register_parametrization(module, shift.parameter, Shifted())
        place = _shifted(module, shift.parameter)
        place.differences[name] = shift.values.detach().float()
        place.weights[name] = 1.0


def set_shift_weight(backbone: Backbone, name: str, weight: float) -> None:
    """Set the weight of an adapter's shifts."""
    for _, _, place in _places(backbone):
        if name in place.weights:
            place.weights[name] = weight


def has_shifts(backbone: Backbone, name: str) -> bool:
    """Whether an adapter of that name has shifts in the model."""
    return any(name in place.weights for _, _, place in _places(backbone))


@torch.no_grad()
def remove_shifts(backbone: Backbone, name: str) -> None:
    """Remove an adapter's shifts; a vector without other shifts is the base's own again."""
    for module, parameter, place in _places(backbone):
        place.weights.pop(name, None)
        place.differences.pop(name, None)
        if not place.weights:
            remove_parametrizations(module, parameter, leave_parametrized=False)


def _places(backbone: Backbone) -> list[tuple[nn.Module, str, Shifted]]:
    return [
        (module, parameter, _shifted(module, parameter))
        for root in backbone.components.values()
        for module, parameter in _parametrized(root)
    ]


def _parametrized(root: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    for module in list(root.modules()):
        for parameter in ("weight", "bias"):
            if is_parametrized(module, parameter):
                yield module, parameter


def _shifted(module: nn.Module, parameter: str) -> Shifted:
    [place] = module.parametrizations[parameter]  # pyright: ignore
    assert isinstance(place, Shifted)
    return place
