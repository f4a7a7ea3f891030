"""Text encoders of single-file checkpoints: OpenAI's CLIP, and OpenCLIP under its own names."""

import re
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from rite_diffusion.backbones.checkpoint import (
    CLIP,
    OPEN_CLIP,
    XL_OPEN_CLIP,
    Checkpoint,
    load_weights,
)
from rite_diffusion.errors import BackboneError

Config = dict[str, Any]

END = 49407  # the end mark, whose state is the pooled state

_OPEN_NAMES = {
    "token_embedding.": "embeddings.token_embedding.",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.": "final_layer_norm.",
    "ln_1.": "layer_norm1.",
    "ln_2.": "layer_norm2.",
    "attn.out_proj.": "self_attn.out_proj.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
}


def clip_config(checkpoint: Checkpoint, start: str = CLIP) -> Config:
    """Arguments of CLIPTextConfig for OpenAI's CLIP; its heads have 64 channels."""
    stem = start + ("text_model." if checkpoint.has(f"{start}text_model.") else "")
    tokens, width = checkpoint.shape(f"{stem}embeddings.token_embedding.weight")
    positions, _ = checkpoint.shape(f"{stem}embeddings.position_embedding.weight")
    return {
        "vocab_size": tokens,
        "max_position_embeddings": positions,
        "hidden_size": width,
        "projection_dim": width,
        "intermediate_size": checkpoint.shape(f"{stem}encoder.layers.0.mlp.fc1.weight")[0],
        "num_hidden_layers": checkpoint.length(stem + "encoder.layers.{}."),
        "num_attention_heads": max(width // 64, 1),
    }


def open_clip_config(checkpoint: Checkpoint, start: str) -> Config:
    """Arguments of CLIPTextConfig for OpenCLIP; SD2 does not use its last layer."""
    tokens, width = checkpoint.shape(f"{start}token_embedding.weight")
    positions, _ = checkpoint.shape(f"{start}positional_embedding")
    layers = checkpoint.length(start + "transformer.resblocks.{}.")
    projected = start == XL_OPEN_CLIP
    return {
        "vocab_size": tokens,
        "max_position_embeddings": positions,
        "hidden_size": width,
        "projection_dim": checkpoint.shape(f"{start}text_projection")[1] if projected else width,
        "intermediate_size": checkpoint.shape(f"{start}transformer.resblocks.0.mlp.c_fc.weight")[0],
        "num_hidden_layers": layers if projected else layers - 1,
        "num_attention_heads": max(width // 64, 1),
        "hidden_act": "gelu",
        "bos_token_id": END - 1,
        "eos_token_id": END,
    }


def text_config(checkpoint: Checkpoint, start: str) -> Config:
    """Arguments of CLIPTextConfig for the text encoder whose tensors' names start with `start`."""
    is_open = start in (OPEN_CLIP, XL_OPEN_CLIP)
    return open_clip_config(checkpoint, start) if is_open else clip_config(checkpoint, start)


def load_clip(
    checkpoint: Checkpoint, config: Config, dtype: torch.dtype, start: str = CLIP
) -> CLIPTextModel:
    """OpenAI's CLIP text encoder."""
    part = checkpoint.read(start, dtype)
    with init_empty_weights():
        model = CLIPTextModel(CLIPTextConfig(**config))
    # transformers >= 5.6 has no `text_model` level, and some old files have none either.
    flat = {name.removeprefix(start).removeprefix("text_model."): part[name] for name in part}
    return load_weights(model, part, flat, checkpoint.path)


def load_open_clip(checkpoint: Checkpoint, config: Config, dtype: torch.dtype) -> CLIPTextModel:
    """SD2's text encoder."""
    part, weights = _read_open_clip(checkpoint, config, dtype, OPEN_CLIP)
    with init_empty_weights():
        model = CLIPTextModel(CLIPTextConfig(**config))
    return load_weights(model, part, weights, checkpoint.path)


def load_projected_clip(
    checkpoint: Checkpoint, config: Config, dtype: torch.dtype
) -> CLIPTextModelWithProjection:
    """SDXL's second text encoder, with the projection of the pooled state."""
    part, weights = _read_open_clip(checkpoint, config, dtype, XL_OPEN_CLIP)
    nested = {
        name if name.startswith("text_projection") else f"text_model.{name}": tensor
        for name, tensor in weights.items()
    }
    with init_empty_weights():
        model = CLIPTextModelWithProjection(CLIPTextConfig(**config))
    return load_weights(model, part, nested, checkpoint.path)


def _read_open_clip(
    checkpoint: Checkpoint, config: Config, dtype: torch.dtype, start: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors that are used, under the file's names and under transformers' names."""
    used = (None, *range(config["num_hidden_layers"]))
    read = checkpoint.read(start, dtype)
    part = {name: tensor for name, tensor in read.items() if _layer(name) in used}
    weights: dict[str, Tensor] = {}
    for name, tensor in part.items():
        weights |= _open_clip_weights(name.removeprefix(start), tensor, checkpoint)
    return part, weights


def _layer(name: str) -> int | None:
    found = re.search(r"resblocks\.(\d+)\.", name)
    return int(found[1]) if found else None


def _open_clip_weights(name: str, tensor: Tensor, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """An OpenCLIP tensor under transformers' names; it is split where it holds q, k and v."""
    if name == "text_projection":
        return {"text_projection.weight": tensor.T}
    name = re.sub(r"^transformer\.resblocks\.", "encoder.layers.", name)
    if found := re.fullmatch(r"(.+)\.attn\.in_proj_(weight|bias)", name):
        if len(tensor) % 3:
            raise BackboneError(f"{checkpoint.path}: {name} cannot be split into q, k and v")
        parts = zip("qkv", tensor.chunk(3), strict=True)
        return {f"{found[1]}.self_attn.{key}_proj.{found[2]}": value for key, value in parts}
    for theirs, ours in _OPEN_NAMES.items():
        name = re.sub(rf"(^|(?<=\.)){re.escape(theirs)}", ours, name)
    return {name: tensor}
