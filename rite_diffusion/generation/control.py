"""Condition pictures: poses, edges and depths that the denoiser follows.

A ControlNet (Zhang et al. 2023, arXiv 2302.05543) looks at the noisy latents in every step; a
T2I-Adapter (Mou et al. 2023, arXiv 2302.08453) looks at the condition picture once. Both add what
they find to the features of the denoiser's way down.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel, T2IAdapter
from PIL.Image import Image, Resampling
from torch import Tensor, nn

from rite_diffusion.backbones.control import ControlNetwork, load_control_network
from rite_diffusion.backbones.protocols import Backbone
from rite_diffusion.errors import ConfigError
from rite_diffusion.files.writing import user_path
from rite_diffusion.generation.denoise import Predict
from rite_diffusion.photos.images import UnreadableImage, open_image, to_tensor

FORM = '"MODEL=PICTURE[:WEIGHT]", such as "lllyasviel/sd-controlnet-openpose=pose.png:0.8"'


@dataclass(frozen=True)
class Wanted:
    """A condition as a user names it, with its picture."""

    model: str
    path: Path
    image: Image
    weight: float

    def record(self) -> str:
        """What decides pixels, without a path: model, picture and the hash of its content."""
        digest = hashlib.sha256(self.path.read_bytes()).hexdigest()[:16]
        return f"{Path(self.model).name}={self.path.name}:{self.weight:g} ({digest})"


@dataclass(frozen=True)
class Control:
    """A network and its condition picture (1, channels, H, W) in [0, 1]."""

    network: ControlNetwork
    condition: Tensor
    weight: float


def parse_control(text: str) -> Wanted:
    """The condition of `MODEL=PICTURE[:WEIGHT]`; ConfigError says what is off."""
    model, _, rest = text.partition("=")
    if not (model and rest):
        raise ConfigError(f"condition '{text}' is not {FORM}")
    path, weight = _split_weight(rest)
    if not 0 < weight <= 2:
        raise ConfigError(f"condition '{text}': weight {weight:g} is not above 0 and at most 2")
    try:
        return Wanted(model, path, open_image(path), weight)
    except UnreadableImage as error:
        raise ConfigError(f"condition '{text}': {path} is no good ({error})") from None


def _split_weight(text: str) -> tuple[Path, float]:
    head, _, tail = text.rpartition(":")
    try:
        return user_path(head), float(tail if head else "")
    except ValueError:
        return user_path(text), 1.0


def load_controls(
    backbone: Backbone, wanted: Sequence[Wanted], width: int, height: int
) -> list[Control]:
    """The networks with their pictures at the size that is drawn, in pixels.

    BackboneError where a network cannot be opened, ConfigError where it is not for this base.
    """
    if wanted and not backbone.cross_attentions:
        raise ConfigError(f"condition pictures are for Stable Diffusion, {backbone.name} is not.")
    return [_control(backbone, each, width, height) for each in wanted]


def _control(backbone: Backbone, wanted: Wanted, width: int, height: int) -> Control:
    network = load_control_network(wanted.model, backbone.dtype, backbone.device)
    _check_fit(network, wanted.model, backbone)
    small = wanted.image.resize((width, height), Resampling.LANCZOS)
    condition = (to_tensor(small)[None] + 1) / 2
    if isinstance(network, T2IAdapter) and network.config["in_channels"] == 1:
        condition = condition.mean(1, keepdim=True)
    return Control(network, condition.to(backbone.device, backbone.dtype), wanted.weight)


def _check_fit(network: ControlNetwork, model: str, backbone: Backbone) -> None:
    """ConfigError where the network's widths are not the denoiser's."""
    names = ("block_out_channels", "cross_attention_dim")
    denoiser: dict[str, Any] = backbone.components[backbone.denoiser_name].config  # pyright: ignore[reportAssignmentType]
    ours = {name: denoiser[name] for name in names}
    if isinstance(network, T2IAdapter):
        theirs = {"block_out_channels": network.config["channels"]}
    else:
        theirs = {name: network.config[name] for name in names}
    for name, value in theirs.items():
        found, needed = _listed(value), _listed(ours[name])
        if found != needed:
            raise ConfigError(
                f"{model} has {name} {found}, {backbone.name} has {needed}: choose a network "
                "for this kind of base model."
            )


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value


@torch.no_grad()
def under_control(
    predict: Predict,
    backbone: Backbone,
    controls: Sequence[Control],
    texts: Sequence[str],
) -> Predict:
    """What predicts with the condition pictures in force.

    `texts` are the whole picture's prompt and negative prompt, whose states come before those of
    regions. The denoiser is changed for the length of each prediction only.
    """
    if not controls:
        return predict
    tokens = backbone.encoded_length(list(texts))
    features = [_features(each) for each in controls]

    def hook(module: nn.Module, arguments: tuple, keywords: dict[str, Any]):
        return arguments, keywords | _residuals(controls, features, tokens, arguments, keywords)

    def controlled(latents: Tensor, timestep: Tensor) -> Tensor:
        denoiser = backbone.components[backbone.denoiser_name]
        handle = denoiser.register_forward_pre_hook(hook, with_kwargs=True)
        try:
            return predict(latents, timestep)
        finally:
            handle.remove()

    return controlled


@torch.no_grad()
def _features(control: Control) -> list[Tensor]:
    """What a T2I-Adapter finds in its picture, level by level; nothing of a ControlNet."""
    if isinstance(control.network, ControlNetModel):
        return []
    return [control.weight * level for level in control.network(control.condition)]


def _residuals(
    controls: Sequence[Control],
    features: Sequence[list[Tensor]],
    tokens: int,
    arguments: tuple,
    keywords: dict[str, Any],
) -> dict[str, Any]:
    """What the denoiser, called with these arguments, adds to its features."""
    found: dict[str, Any] = {}
    nets = [c for c in controls if isinstance(c.network, ControlNetModel)]
    if nets:
        each = [_net_residuals(control, tokens, arguments, keywords) for control in nets]
        found["down_block_additional_residuals"] = [
            torch.stack(levels).sum(0) for levels in zip(*(down for down, _ in each), strict=True)
        ]
        found["mid_block_additional_residual"] = torch.stack([mid for _, mid in each]).sum(0)
    levels = [each for each in features if each]
    if levels:
        found["down_intrablock_additional_residuals"] = [
            torch.cat(level).sum(0, keepdim=True).expand(len(arguments[0]), -1, -1, -1).clone()
            for level in zip(*levels, strict=True)
        ]
    return found


def _net_residuals(
    control: Control, tokens: int, arguments: tuple, keywords: dict[str, Any]
) -> tuple[list[Tensor], Tensor]:
    """A ControlNet's residuals; it is told the whole picture's prompt, the mean of its layers."""
    noisy, timestep = arguments
    states = keywords["encoder_hidden_states"][..., :tokens, :]
    return control.network(
        noisy,
        timestep,
        encoder_hidden_states=states if states.ndim == 3 else states.mean(1),
        controlnet_cond=control.condition.expand(len(noisy), -1, -1, -1),
        conditioning_scale=control.weight,
        added_cond_kwargs=keywords.get("added_cond_kwargs"),
        return_dict=False,
    )
