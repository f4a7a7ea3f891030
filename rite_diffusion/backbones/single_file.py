"""A Stable Diffusion 1.x pipeline from one .safetensors file in the original (LDM) layout.

Nothing is downloaded: sizes are read off the tensors' shapes, so that any width opens. What shapes
cannot say is taken to be as in SD1: 8 attention heads in the UNet, 64 channels to a CLIP head,
norms over 32 groups, latents scaled by 0.18215, pictures of 512 pixels, the noise schedule.
"""

import re
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from rite_diffusion.backbones.checkpoint import (
    CLIP,
    UNET,
    VAE,
    Checkpoint,
    check_names,
    check_parts,
    read_header,
)
from rite_diffusion.backbones.clip_tokenizer import clip_tokenizer
from rite_diffusion.types import BackboneError

Model = TypeVar("Model", bound=nn.Module)
Config = dict[str, Any]

TOKENS, POSITIONS = 49408, 77  # of CLIP's tokenizer
PIXELS = 512


def load_single_file(path: Path, dtype: torch.dtype = torch.float32) -> StableDiffusionPipeline:
    """The pipeline of an SD1.x `.safetensors` checkpoint, its weights in `dtype`, in eval mode.

    Raises BackboneError where the file is damaged, a pickle or another kind of model, and where its
    tensors are not exactly those that its sizes call for.
    """
    checkpoint = read_header(path)
    check_parts(checkpoint)
    unet, vae, clip = unet_config(checkpoint), vae_config(checkpoint), clip_config(checkpoint)
    check_sizes(path, unet, vae, clip)
    return StableDiffusionPipeline(
        unet=_load_unet(checkpoint, unet, dtype),
        vae=_load_vae(checkpoint, vae, dtype),
        text_encoder=_load_clip(checkpoint, clip, dtype),
        tokenizer=clip_tokenizer(),
        scheduler=noise_schedule(checkpoint),  # pyright: ignore[reportArgumentType]
        safety_checker=None,  # pyright: ignore[reportArgumentType]
        feature_extractor=None,  # pyright: ignore[reportArgumentType]
        requires_safety_checker=False,
    )


def unet_config(checkpoint: Checkpoint) -> Config:
    """Arguments of UNet2DConditionModel.

    `input_blocks` lists conv_in, then for each level its resnets and, but for the last, a
    downsampler; `output_blocks` mirrors it.
    """
    resnet = UNET + "input_blocks.{}.0.in_layers.2.weight"
    states = f"{UNET}middle_block.1.transformer_blocks.0.attn2.to_k.weight"
    blocks = checkpoint.length(UNET + "input_blocks.{}.")
    checkpoint.shape(resnet.format(1))
    layers = sum(1 for _ in takewhile(checkpoint.has, map(resnet.format, range(1, blocks))))
    firsts = range(1, blocks, layers + 1)  # each level's first resnet
    attends = [checkpoint.has(f"{UNET}input_blocks.{first}.1.") for first in firsts]
    kinds = ["CrossAttn" if attention else "" for attention in attends]
    return {
        "in_channels": checkpoint.shape(f"{UNET}input_blocks.0.0.weight")[1],
        "out_channels": checkpoint.shape(f"{UNET}out.2.weight")[0],
        "block_out_channels": tuple(checkpoint.shape(resnet.format(i))[0] for i in firsts),
        "layers_per_block": layers,
        "down_block_types": tuple(f"{kind}DownBlock2D" for kind in kinds),
        "up_block_types": tuple(f"{kind}UpBlock2D" for kind in reversed(kinds)),
        "cross_attention_dim": checkpoint.shape(states)[1],
        "attention_head_dim": 8,  # diffusers' name for the number of heads
        "sample_size": picture_size(checkpoint) // 2 ** (vae_levels(checkpoint) - 1),
    }


def vae_config(checkpoint: Checkpoint) -> Config:
    """Arguments of AutoencoderKL."""
    levels = vae_levels(checkpoint)
    conv = VAE + "encoder.down.{}.block.0.conv1.weight"
    return {
        "in_channels": checkpoint.shape(f"{VAE}encoder.conv_in.weight")[1],
        "out_channels": checkpoint.shape(f"{VAE}decoder.conv_out.weight")[0],
        "latent_channels": checkpoint.shape(f"{VAE}decoder.conv_in.weight")[1],
        "block_out_channels": tuple(checkpoint.shape(conv.format(i))[0] for i in range(levels)),
        "layers_per_block": checkpoint.length(VAE + "encoder.down.0.block.{}."),
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "mid_block_add_attention": checkpoint.has(f"{VAE}decoder.mid.attn_1."),
        "scaling_factor": 0.18215,
        "sample_size": picture_size(checkpoint),
    }


def clip_config(checkpoint: Checkpoint) -> Config:
    """Arguments of CLIPTextConfig."""
    stem = CLIP + ("text_model." if checkpoint.has(f"{CLIP}text_model.") else "")
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


def vae_levels(checkpoint: Checkpoint) -> int:
    """Levels of the autoencoder, one more than it halves the picture."""
    checkpoint.shape(f"{VAE}encoder.down.0.block.0.conv1.weight")
    return checkpoint.length(VAE + "encoder.down.{}.")


def picture_size(checkpoint: Checkpoint) -> int:
    """Pixels along the side of a picture that the model was trained on, where the file says it.

    The key is that of Stability's ModelSpec, which trainers such as kohya's write.
    """
    stated = re.fullmatch(r"(\d{2,4})x\d{2,4}", checkpoint.metadata.get("modelspec.resolution", ""))
    return int(stated[1]) if stated else PIXELS


def check_sizes(path: Path, unet: Config, vae: Config, clip: Config) -> None:
    """Raises BackboneError where the parts do not fit each other or are not text-to-image."""
    channels, latents = unet["in_channels"], vae["latent_channels"]
    attended, states = unet["cross_attention_dim"], clip["hidden_size"]
    widths = {*unet["block_out_channels"], *vae["block_out_channels"]}
    tokens, positions = clip["vocab_size"], clip["max_position_embeddings"]
    faults = [
        (channels == 9, "it is an inpainting model (9 input channels)"),
        (channels != latents, f"its UNet takes {channels} channels, its latents have {latents}"),
        (attended != states, f"its UNet reads text of width {attended}, its CLIP gives {states}"),
        (any(width % 32 for width in widths), f"widths {widths} are not all multiples of 32"),
        (states % clip["num_attention_heads"] != 0, f"CLIP's width {states} is no multiple of 64"),
        (tokens < TOKENS, f"it knows {tokens} tokens, CLIP's tokenizer {TOKENS}"),
        (positions < POSITIONS, f"it reads {positions} tokens, CLIP's tokenizer gives {POSITIONS}"),
    ]
    for found, fault in faults:
        if found:
            raise BackboneError(
                f"{path} is no Stable Diffusion 1.x that this toolkit can train: {fault}. "
                "Pass another checkpoint, or the model's diffusers folder."
            )


def noise_schedule(checkpoint: Checkpoint) -> DDIMScheduler:
    """SD1's sampler; a `v_pred` or `ztsnr` mark changes the objective or the last timestep."""
    stated = checkpoint.metadata.get("modelspec.prediction_type")
    velocity = "v_pred" in checkpoint.shapes or stated == "v"
    zero_snr = "ztsnr" in checkpoint.shapes  # Lin et al. 2024: no signal is left at the last step
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction" if velocity else "epsilon",
        rescale_betas_zero_snr=zero_snr,
        timestep_spacing="trailing" if zero_snr else "leading",
    )


def _load_unet(checkpoint: Checkpoint, config: Config, dtype: torch.dtype) -> UNet2DConditionModel:
    part = checkpoint.read(UNET, dtype)
    with init_empty_weights():
        model = UNet2DConditionModel(**config)
    weights = _converted(convert_ldm_unet_checkpoint, part, config, checkpoint.path)
    return _filled(model, part, weights, checkpoint.path)


def _load_vae(checkpoint: Checkpoint, config: Config, dtype: torch.dtype) -> AutoencoderKL:
    part = checkpoint.read(VAE, dtype)
    with init_empty_weights():
        model = AutoencoderKL(**config)
    weights = _converted(convert_ldm_vae_checkpoint, part, config, checkpoint.path)
    return _filled(model, part, weights, checkpoint.path)


def _load_clip(checkpoint: Checkpoint, config: Config, dtype: torch.dtype) -> CLIPTextModel:
    part = checkpoint.read(CLIP, dtype)
    with init_empty_weights():
        model = CLIPTextModel(CLIPTextConfig(**config))
    # transformers >= 5.6 has no `text_model` level, and some old files have none either.
    flat = {name.removeprefix(CLIP).removeprefix("text_model."): part[name] for name in part}
    return _filled(model, part, flat, checkpoint.path)


def _converted(
    convert: Callable, part: dict[str, Tensor], config: Config, path: Path
) -> dict[str, Tensor]:
    """The file's `part` under diffusers' names.

    For a sampler's weight without its bias the converters raise KeyError or yield None.
    """
    try:
        weights = convert(part, config)
    except KeyError as error:
        raise BackboneError(f"{path} lacks the tensor {error}. Download it again.") from None
    return {name: tensor for name, tensor in weights.items() if tensor is not None}


def _filled(model: Model, part: dict[str, Tensor], weights: dict[str, Tensor], path: Path) -> Model:
    """The model with `weights`, which diffusers' converter made of the file's `part`."""
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    kept = {tensor.data_ptr() for tensor in weights.values()}  # converters drop unknown names
    dropped = {name for name, tensor in part.items() if tensor.data_ptr() not in kept}
    both = wanted.keys() & weights.keys()
    faults = {
        "missing": wanted.keys() - weights.keys(),
        "unexpected": (weights.keys() - wanted.keys()) | dropped,
        "of another shape": {name for name in both if weights[name].shape != wanted[name]},
    }
    check_names(path, faults)
    model.load_state_dict(weights, assign=True)
    return model.eval()
