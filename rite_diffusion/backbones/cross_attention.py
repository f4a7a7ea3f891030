"""The cross-attentions of a UNet, in the order in which a picture passes them."""

from typing import Any

from diffusers.models.attention_processor import Attention
from torch import nn

STAGES = ("down_blocks", "mid_block", "up_blocks")


def cross_attentions(unet: nn.Module) -> list[Attention]:
    """All cross-attentions: down, middle, up."""
    named = [(p, m) for p, m in unet.named_modules() if isinstance(m, Attention)]
    return [
        module
        for stage in STAGES
        for path, module in named
        if path.startswith(f"{stage}.") and module.is_cross_attention
    ]


def select_layer_states(attentions: list[Attention]) -> None:
    """Let cross-attention number l look at its own of layer-wise text states (B, L, tokens, width).

    Of states (B, tokens, width) all see the same, as ever. The hooks depend on their input alone,
    so they hold under gradient checkpointing and `torch.compile` too.
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
