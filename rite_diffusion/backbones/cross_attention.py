"""The cross-attentions of a UNet, in the order of the forward pass."""

from typing import Any

from diffusers.models.attention_processor import Attention
from torch import nn

STAGES = ("down_blocks", "mid_block", "up_blocks")


def cross_attentions(unet: nn.Module) -> list[Attention]:
    """All cross-attentions of the UNet: down blocks, mid block, up blocks."""
    named = [(p, m) for p, m in unet.named_modules() if isinstance(m, Attention)]
    return [
        module
        for stage in STAGES
        for path, module in named
        if path.startswith(f"{stage}.") and module.is_cross_attention
    ]


def select_layer_states(attentions: list[Attention]) -> None:
    """Add hooks that give cross-attention number l the states [:, l] of (B, L, tokens, width).

    States (B, tokens, width) are passed on unchanged. The hooks depend on their input only, so they
    work with gradient checkpointing and `torch.compile`.
    """
    for number, module in enumerate(attentions):
        module.register_forward_pre_hook(_own_states(number), with_kwargs=True)


def _own_states(number: int):
    def hook(module: nn.Module, arguments: tuple, keywords: dict[str, Any]):
        states = keywords["encoder_hidden_states"]
        if states.ndim == 4:
            keywords = keywords | {"encoder_hidden_states": states[:, number]}
        return arguments, keywords

    return hook
