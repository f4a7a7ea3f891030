"""The original (CompVis, Stability) names of Stable Diffusion's weights, written from that code.

`ldm.modules.diffusionmodules.openaimodel.UNetModel`, `.model.Encoder` and `.Decoder`, and
`FrozenCLIPEmbedder` or OpenCLIP's text tower, inside `LatentDiffusion` or SDXL's engine.
Independent of diffusers' converters.
"""

import re

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

UNET_STEMS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}

UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}

VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}


def ldm_state_dict(pipeline: StableDiffusionPipeline) -> dict[str, Tensor]:
    """The pipeline's weights as a CompVis checkpoint names and shapes them."""
    layers, levels = pipeline.unet.config.layers_per_block, len(pipeline.vae.encoder.down_blocks)
    kinds = enumerate(pipeline.unet.config.up_block_types)
    attending = [level for level, kind in kinds if kind.startswith("CrossAttn")]
    state = {}
    for name, tensor in pipeline.unet.state_dict().items():
        state[f"model.diffusion_model.{unet_name(name, layers, attending)}"] = tensor
    for name, tensor in pipeline.vae.state_dict().items():
        # Attention projections, the only matrices, were 1x1 convolutions.
        old = tensor[:, :, None, None].clone() if tensor.ndim == 2 else tensor
        state[f"first_stage_model.{vae_name(name, levels)}"] = old
    return state | text_state_dict(pipeline)


def text_state_dict(pipeline) -> dict[str, Tensor]:
    """The text encoders' weights: SDXL has two, SD2 OpenCLIP's with a last layer that it skips."""
    if "text_encoder_2" in pipeline.components:
        second = open_clip_state_dict(pipeline.text_encoder_2, "conditioner.embedders.1.model.")
        second["conditioner.embedders.1.model.logit_scale"] = torch.ones(())
        return clip_state_dict(pipeline.text_encoder, "conditioner.embedders.0.") | second
    if pipeline.text_encoder.config.hidden_act != "gelu":
        return clip_state_dict(pipeline.text_encoder, "cond_stage_model.")
    start = "cond_stage_model.model."
    state = open_clip_state_dict(pipeline.text_encoder, start)
    last = pipeline.text_encoder.config.num_hidden_layers
    first_block = f"{start}transformer.resblocks.0."
    for name in [name for name in state if name.startswith(first_block)]:
        unused = f"{start}transformer.resblocks.{last}." + name.removeprefix(first_block)
        state[unused] = torch.zeros_like(state[name])
    state[f"{start}text_projection"] = torch.ones(2, 2)
    return state


def clip_state_dict(encoder, start: str) -> dict[str, Tensor]:
    """OpenAI's CLIP as transformers named it before 5.6."""
    stem = f"{start}transformer.text_model."
    state = {stem + name: tensor for name, tensor in encoder.state_dict().items()}
    positions = encoder.config.max_position_embeddings
    state[f"{stem}embeddings.position_ids"] = torch.arange(positions)[None]
    return state


def open_clip_state_dict(encoder, start: str) -> dict[str, Tensor]:
    """OpenCLIP's `TextTransformer`, whose q, k and v are one matrix."""
    own = {n.removeprefix("text_model."): t for n, t in encoder.state_dict().items()}
    state = {
        "token_embedding.weight": own["embeddings.token_embedding.weight"],
        "positional_embedding": own["embeddings.position_embedding.weight"],
    }
    if "text_projection.weight" in own:
        state["text_projection"] = own["text_projection.weight"].T
    for kind in ("weight", "bias"):
        state[f"ln_final.{kind}"] = own[f"final_layer_norm.{kind}"]
        for i in range(encoder.config.num_hidden_layers):
            layer, block = f"encoder.layers.{i}.", f"transformer.resblocks.{i}."
            qkv = [own[f"{layer}self_attn.{part}_proj.{kind}"] for part in "qkv"]
            state[f"{block}attn.in_proj_{kind}"] = torch.cat(qkv)
            state[f"{block}attn.out_proj.{kind}"] = own[f"{layer}self_attn.out_proj.{kind}"]
            for theirs, ours in (("ln_1", "layer_norm1"), ("ln_2", "layer_norm2"),
                                 ("mlp.c_fc", "mlp.fc1"), ("mlp.c_proj", "mlp.fc2")):  # fmt: skip
                state[f"{block}{theirs}.{kind}"] = own[f"{layer}{ours}.{kind}"]
    return {start + name: tensor for name, tensor in state.items()}


def unet_name(name: str, layers: int, attending: list[int]) -> str:
    """A UNet weight's CompVis name; up blocks in `attending` have attention."""
    stem, _, kind = name.rpartition(".")
    if stem in UNET_STEMS:
        return f"{UNET_STEMS[stem]}.{kind}"
    side, *rest = name.split(".")
    if side == "mid_block":
        group, index, *inner = rest
        place = 2 * int(index) if group == "resnets" else 1
        return f"middle_block.{place}." + _inner(group, inner)
    level, group, index, *inner = rest
    first = int(level) * (layers + 1)
    if group == "downsamplers":  # its own input block, after the level's resnets
        return f"input_blocks.{first + layers + 1}.0.op.{kind}"
    if group == "upsamplers":  # the last entry of the level's last output block
        return f"output_blocks.{first + layers}.{2 if int(level) in attending else 1}.conv.{kind}"
    place = first + int(index)  # input block 0 is conv_in
    block = f"input_blocks.{place + 1}" if side == "down_blocks" else f"output_blocks.{place}"
    return f"{block}.{0 if group == 'resnets' else 1}." + _inner(group, inner)


def _inner(group: str, inner: list[str]) -> str:
    if group == "resnets":
        return ".".join([UNET_RESNET[inner[0]], *inner[1:]])
    return ".".join(inner)  # transformers kept their names


def vae_name(name: str, levels: int) -> str:
    """An autoencoder weight's CompVis name; the decoder's levels count from the finest."""
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    if ".mid_block.attentions.0." in name:
        side, inner = name.split(".mid_block.attentions.0.")
        stem, _, kind = inner.rpartition(".")
        return f"{side}.mid.attn_1.{VAE_ATTENTION[stem]}.{kind}"
    name = re.sub(r"down_blocks\.(\d)\.", r"down.\1.", name)
    name = re.sub(r"up_blocks\.(\d)\.", lambda m: f"up.{levels - 1 - int(m[1])}.", name)
    name = name.replace("downsamplers.0.conv", "downsample.conv")
    return name.replace("upsamplers.0.conv", "upsample.conv").replace(".resnets.", ".block.")
