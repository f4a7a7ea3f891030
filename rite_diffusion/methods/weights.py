"""What a method can train in a backbone beside words: LoRA pairs, or whole matrices."""

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rite_diffusion.adapters import detach, inject, read_pairs
from rite_diffusion.adapters.names import module_name
from rite_diffusion.backbones.protocols import Backbone
from rite_diffusion.config import TrainConfig
from rite_diffusion.methods.method import NAME
from rite_diffusion.types import LoraPair


class Weights(Protocol):
    """Trainable weights that are in the backbone until `remove`."""

    def groups(self) -> list[dict]:
        """Their parameter groups."""
        ...

    def pairs(self) -> list[LoraPair]:
        """What they add to the base's weights."""
        ...

    def remove(self) -> None:
        """Take them out."""
        ...


def adapted_paths(backbone: Backbone, config: TrainConfig) -> dict[str, list[str]]:
    """Paths per component of the layers that `lora.layers` and `lora.text_encoder` choose."""
    components = list(backbone.components) if config.lora.text_encoder else ["unet"]
    blocks = config.lora.layers == "blocks"
    return {name: backbone.lora_targets(name, blocks) for name in components}


class LoraWeights:
    """Fresh pairs at paths per component, a function of the seed; scale = alpha / rank."""

    def __init__(self, backbone: Backbone, config: TrainConfig, paths: dict[str, list[str]]):
        self.backbone = backbone
        self.config = config
        rank, alpha = config.lora.rank, config.lora.alpha or config.lora.rank
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            inject(backbone, NAME, paths, rank, alpha)
        self._named = {component: _trainable(backbone, component) for component in paths}

    def groups(self) -> list[dict]:
        """A group for the UNet's pairs and one for each text encoder's."""
        optim = self.config.optim
        return [
            {
                "name": component,
                "params": list(named),
                "lr": optim.lr_unet if component == "unet" else optim.lr_text_encoder,
                "weight_decay": optim.weight_decay,
            }
            for component, named in self._named.items()
        ]

    def pairs(self) -> list[LoraPair]:
        """The pairs in training."""
        return read_pairs(self.backbone, NAME)

    def remove(self) -> None:
        """Take the LoRA layers out."""
        detach(self.backbone, NAME)


def _trainable(backbone: Backbone, component: str) -> list[tuple[str, nn.Parameter]]:
    named = backbone.components[component].named_parameters()
    return [(f"{component}.{name}", each) for name, each in named if each.requires_grad]


class FullWeights:
    """Whole matrices of the UNet's linear layers, as what is added to the base's own.

    Weight decay therefore draws to the base, where decay of the sum would draw to zero.
    """

    def __init__(self, backbone: Backbone, config: TrainConfig, paths: list[str]):
        self.config = config
        unet = backbone.components[backbone.denoiser_name]
        self._deltas: dict[str, nn.Parameter] = {}
        self._handles = []
        for path in paths:
            layer = unet.get_submodule(path)
            assert isinstance(layer, nn.Linear)
            delta = nn.Parameter(torch.zeros_like(layer.weight, dtype=torch.float32))
            self._deltas[path] = delta
            self._handles.append(layer.register_forward_hook(_adding(delta)))

    def groups(self) -> list[dict]:
        """One group."""
        named = [(f"unet.{path}.delta", delta) for path, delta in self._deltas.items()]
        optim = self.config.optim
        rates = {"lr": optim.lr_unet, "weight_decay": optim.weight_decay}
        return [{"name": "unet", "params": named} | rates]

    def pairs(self) -> list[LoraPair]:
        """The matrices as pairs of full rank, which are exact: one factor is the identity."""
        return [full_pair(module_name("unet", path), d) for path, d in self._deltas.items()]

    def remove(self) -> None:
        """Take the hooks out."""
        for handle in self._handles:
            handle.remove()


def _adding(delta: nn.Parameter):
    def hook(module: nn.Module, arguments: tuple, output: Tensor) -> Tensor:
        return output + F.linear(arguments[0].to(delta.dtype), delta).to(output.dtype)

    return hook


def full_pair(name: str, delta: Tensor) -> LoraPair:
    """A delta (out, in) as a pair of its full rank."""
    delta = delta.detach()
    identity = torch.eye(min(delta.shape), dtype=delta.dtype, device=delta.device)
    wide = delta.shape[0] <= delta.shape[1]
    return LoraPair(name, delta, identity, 1.0) if wide else LoraPair(name, identity, delta, 1.0)
