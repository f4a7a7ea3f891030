"""Trainable weights of a backbone other than embeddings: LoRA pairs, or whole matrices."""

from functools import partial
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rite_diffusion.adapters.attach import detach, inject, read_pairs, weight_shape
from rite_diffusion.adapters.names import module_name
from rite_diffusion.backbones.protocols import Backbone
from rite_diffusion.config import LoraSection, OptimSection, TrainConfig
from rite_diffusion.errors import ConfigError
from rite_diffusion.methods.init import LeadingPairs
from rite_diffusion.methods.method import NAME
from rite_diffusion.methods.products import ProductWeights, new_product
from rite_diffusion.optim import optimizer_spec
from rite_diffusion.types import LoraPair, ProductUpdate

MAGNITUDE = "lora_magnitude_vector"  # in the names of DoRA's magnitudes

NamedParameters = dict[str, list[tuple[str, nn.Parameter]]]  # by component


class Weights(Protocol):
    """Trainable weights that act in the backbone until `remove`."""

    @property
    def named(self) -> NamedParameters:
        """The trainable parameters by component."""
        ...

    def pairs(self) -> list[LoraPair]:
        """The updates of the base's weights as LoRA pairs."""
        ...

    def products(self) -> list[ProductUpdate]:
        """The updates of the base's weights as LoHa or LoKr."""
        ...

    def remove(self) -> None:
        """Remove them from the backbone."""
        ...


def adapted_paths(
    backbone: Backbone, layers: str = "attention", text_encoder: bool = True
) -> dict[str, list[str]]:
    """Component -> paths of the layers to adapt: `attention`, or all layers of the `blocks`."""
    components = list(backbone.architecture) if text_encoder else [backbone.denoiser_name]
    return {name: backbone.lora_targets(name, layers == "blocks") for name in components}


def check_rank(backbone: Backbone, lora: LoraSection, optimizer: str) -> None:
    """ConfigError for a rank above the width of the narrowest adapted layer.

    Of a LoKr any rank will do, but a LoRA-aware optimizer needs a layer that has factors.
    """
    layers = [
        backbone.architecture[part].get_submodule(path)
        for part, paths in adapted_paths(backbone, lora.layers, lora.text_encoder).items()
        for path in paths
    ]
    shapes = [weight_shape(each) for each in layers]
    if lora.kind == "lokr":
        with torch.device("meta"):
            whole = all(new_product(lora, shape).is_whole for shape in dict.fromkeys(shapes))
        if whole and optimizer_spec(optimizer).moves_pairs:
            raise ConfigError(
                f"optim.name = {optimizer} moves pairs of factors, and this lora.kind = lokr has "
                "whole matrices alone: use another, such as adamw, or a lower lora.rank without "
                "lora.full_matrix."
            )
        return
    widths = [min(outputs, prod(inputs)) for outputs, *inputs in shapes]
    if lora.rank > min(widths):
        raise ConfigError(
            f"lora.rank = {lora.rank} is more than the narrowest layer of {backbone.name} has "
            f"({min(widths)}): choose a smaller rank."
        )


def parameter_groups(
    backbone: Backbone, named: NamedParameters, optim: OptimSection
) -> list[dict[str, Any]]:
    """Torch parameter groups with the settings' learning rates: one for each component.

    A component's DoRA magnitudes have one of their own, without weight decay.
    """
    groups = []
    for component, parameters in named.items():
        rate = optim.lr_unet if component == backbone.denoiser_name else optim.lr_text_encoder
        magnitudes = [each for each in parameters if MAGNITUDE in each[0]]
        pairs = [each for each in parameters if MAGNITUDE not in each[0]]
        groups.append(
            {"name": component, "params": pairs, "lr": rate, "weight_decay": optim.weight_decay}
        )
        if magnitudes:
            spec = optimizer_spec(optim.name)
            own = optimizer_spec("adamw").lr if spec.moves_pairs or spec.rate_free else rate
            groups.append(
                {
                    "name": f"{component} magnitudes",
                    "params": magnitudes,
                    "lr": optim.lr_magnitudes or own,
                    "weight_decay": 0.0,
                    "rate_free": False,
                }
            )
    return groups


class LoraWeights:
    """New LoRA pairs on layers by component, initialised by a seed; `kind` is that of `inject`.

    `alpha` defaults to what makes the scale 1. With `init` = "pissa" the pairs start as the leading
    directions of the weights, which are subtracted from the base (see `methods.init`).
    """

    def __init__(
        self,
        backbone: Backbone,
        paths: dict[str, list[str]],
        *,
        rank: int,
        alpha: float | None = None,
        kind: str = "lora",
        init: str = "gaussian",
        seed: int = 0,
    ):
        self.backbone = backbone
        neutral = rank**0.5 if kind == "rslora" else float(rank)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            inject(backbone, NAME, paths, rank, alpha or neutral, kind)
        self._named = {component: _trainable(backbone, component) for component in paths}
        self._leading = LeadingPairs(backbone, NAME) if init == "pissa" else None

    @property
    def named(self) -> NamedParameters:
        """Component -> the factors `down` and `up` of its pairs."""
        return self._named

    def pairs(self) -> list[LoraPair]:
        """The LoRA pairs in training; after a PiSSA start, copies of twice their rank."""
        pairs = read_pairs(self.backbone, NAME)
        return [self._leading.whole(pair) for pair in pairs] if self._leading else pairs

    def products(self) -> list[ProductUpdate]:
        """None: all updates are pairs."""
        return []

    def remove(self) -> None:
        """Remove the LoRA layers."""
        if self._leading:
            self._leading.remove()
        detach(self.backbone, NAME)


def lora_weights(backbone: Backbone, config: TrainConfig) -> LoraWeights | ProductWeights:
    """New weights of `lora.kind` with the settings of a `TrainConfig`."""
    lora = config.lora
    paths = adapted_paths(backbone, lora.layers, lora.text_encoder)
    return new_weights(backbone, paths, lora, config.seed)


def new_weights(
    backbone: Backbone, paths: dict[str, list[str]], lora: LoraSection, seed: int = 0
) -> LoraWeights | ProductWeights:
    """New weights of `lora.kind` on layers by component."""
    if lora.kind in ("loha", "lokr"):
        return ProductWeights(backbone, paths, partial(new_product, lora), seed)
    return LoraWeights(
        backbone,
        paths,
        rank=lora.rank,
        alpha=lora.alpha,
        kind=lora.kind,
        init=lora.init,
        seed=seed,
    )


def _trainable(backbone: Backbone, component: str) -> list[tuple[str, nn.Parameter]]:
    named = backbone.components[component].named_parameters()
    return [(f"{component}.{name}", each) for name, each in named if each.requires_grad]


class FullWeights:
    """Updates of whole weight matrices of the denoiser's linear layers.

    The update is the parameter, so weight decay pulls to the base's weights instead of to zero.
    """

    def __init__(self, backbone: Backbone, paths: list[str]):
        self.component = backbone.denoiser_name
        denoiser = backbone.components[self.component]
        self._deltas: dict[str, nn.Parameter] = {}
        self._handles = []
        for path in paths:
            layer = denoiser.get_submodule(path)
            assert isinstance(layer, nn.Linear)
            delta = nn.Parameter(torch.zeros(weight_shape(layer), device=backbone.device))
            self._deltas[path] = delta
            self._handles.append(layer.register_forward_hook(_adding(delta)))

    @property
    def named(self) -> NamedParameters:
        """The update matrices, all of the denoiser."""
        deltas = self._deltas.items()
        return {self.component: [(f"{self.component}.{path}.delta", d) for path, d in deltas]}

    def pairs(self) -> list[LoraPair]:
        """The updates as pairs of full rank, without loss: one factor is the identity."""
        return [full_pair(module_name(self.component, path), d) for path, d in self._deltas.items()]

    def products(self) -> list[ProductUpdate]:
        """None: all updates are pairs."""
        return []

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()


def _adding(delta: nn.Parameter):
    def hook(module: nn.Module, arguments: tuple, output: Tensor) -> Tensor:
        return output + F.linear(arguments[0].to(delta.dtype), delta).to(output.dtype)

    return hook


def full_pair(name: str, delta: Tensor) -> LoraPair:
    """An update (out, in) as a pair of full rank."""
    delta = delta.detach()
    identity = torch.eye(min(delta.shape), dtype=delta.dtype, device=delta.device)
    wide = delta.shape[0] <= delta.shape[1]
    return LoraPair(name, delta, identity, 1.0) if wide else LoraPair(name, identity, delta, 1.0)
