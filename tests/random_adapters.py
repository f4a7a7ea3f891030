"""Adapters of random weights: on a base model's own layers, or on layers that only have names."""

from pathlib import Path

import torch

from rite_diffusion.adapters import Adapter, AdapterInfo, save_adapter
from rite_diffusion.adapters.attach import adaptable_layers, base_weights
from rite_diffusion.types import LoraPair

ATTENTION = ("to_q", "to_k", "to_v", "to_out_0", "q_proj", "k_proj", "v_proj", "out_proj")
LAYERS = (*ATTENTION, "proj_in", "ff_net_0_proj", "conv1", "conv_shortcut", "fc1")
BLOCK = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0"
DEEP = "lora_unet_down_blocks_2_attentions_0_transformer_blocks_1"


def random_adapter(backbone, rank=4, alpha=2.0, seed=0) -> Adapter:
    """An adapter on every attention projection, large enough to be seen."""
    torch.manual_seed(seed)
    pairs = []
    for name, (component, path) in adaptable_layers(backbone).items():
        if path in backbone.lora_targets(component):
            out, into = backbone.components[component].get_submodule(path).weight.shape
            down, up = torch.randn(rank, into) / into**0.5, torch.randn(out, rank) * 0.2
            pairs.append(LoraPair(name, down, up, alpha / rank))
    info = AdapterInfo(trigger="<t>", base="pocket", family=backbone.family)
    return Adapter(pairs, info)


def varied_adapter(backbone, layers=ATTENTION, dora=False) -> Adapter:
    """Pairs of ranks 2 to 4, alpha 3, on every layer of the model whose name ends so."""
    torch.manual_seed(0)
    pairs = []
    for index, (name, weight) in enumerate(sorted(base_weights(backbone).items())):
        if name.endswith(layers):
            rank = 2 + index % 3
            down = torch.randn(rank, *weight.shape[1:]) / weight[0].numel() ** 0.5
            up = 0.3 * torch.randn(len(weight), rank, *[1] * (weight.ndim - 2))
            norms = weight.flatten(1).norm(dim=1) * (0.8 + 0.4 * torch.rand(len(weight)))
            pairs.append(LoraPair(name, down, up, 3 / rank, norms if dora else None))
    return Adapter(pairs, AdapterInfo(trigger="<t>", base=backbone.name))


def pair(name, out=12, into=10, rank=4, alpha=2.0, kernel=None, dora=False):
    """Random factors; alpha is not the rank."""
    down = torch.randn(rank, into, *([kernel, kernel] if kernel else []))
    up = torch.randn(out, rank, *([1, 1] if kernel else []))
    return LoraPair(name, down, up, alpha / rank, torch.rand(out) + 0.5 if dora else None)


def mixed_adapter(sdxl=False, dora=False) -> Adapter:
    """Linear, 1x1 and 3x3 layers of several ranks and alphas, in every component."""
    torch.manual_seed(0)
    root = DEEP if sdxl else BLOCK
    pairs = [
        pair(f"{root}_attn1_to_q", rank=4, alpha=2.0, dora=dora),
        pair(f"{root}_attn2_to_out_0", rank=6, alpha=9.0, dora=dora),
        pair(f"{root}_ff_net_0_proj", rank=4, alpha=1.0, dora=dora),
        pair("lora_unet_mid_block_resnets_1_conv1", rank=3, alpha=2.0, kernel=3, dora=dora),
        pair("lora_unet_up_blocks_1_upsamplers_0_conv", rank=2, kernel=3, dora=dora),
        pair("lora_unet_down_blocks_1_attentions_0_proj_in", rank=2, kernel=1, dora=dora),
        pair("lora_te_text_model_encoder_layers_0_self_attn_q_proj", rank=5, alpha=3.0, dora=dora),
        pair("lora_te_text_model_encoder_layers_1_mlp_fc1", rank=4, alpha=4.0, dora=dora),
    ]
    if sdxl:
        pairs.append(pair("lora_te2_text_model_encoder_layers_0_self_attn_v_proj", dora=dora))
    return Adapter(sorted(pairs, key=lambda p: p.name), AdapterInfo(trigger="<t>"))


def small_adapter(path: Path, trigger="<thing>") -> Path:
    """The path of a file with one small pair of ones, which it has written."""
    pair = LoraPair("lora_unet_mid", torch.ones(2, 4), torch.ones(4, 2), 1.0)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_adapter(path, Adapter([pair], AdapterInfo(trigger=trigger, method="lora")))
    return path
