"""The networks of the embedded bases, all of them classes of diffusers and transformers."""

import math

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DConditionModel,
    ZImageTransformer2DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3Model,
)

from . import world

FLOW_SHIFT = 3.0  # of the noise levels, towards noise
LATENT_NOISE = 0.05  # standard deviation of the noise that the decoder learns to bear


def new_autoencoder(widths: tuple[int, ...], latent_channels: int) -> AutoencoderKL:
    """Autoencoder: 128x128 pixels to 16x16 latents and back.

    Most of its weights work at 16x16 and 32x32, where they cost little. Few groups of channels
    share a norm, so that norms change a picture's colours little.
    """
    autoencoder = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=2,
        mid_block_add_attention=False,
        sample_size=world.SIZE,
        scaling_factor=1.0,
        shift_factor=0.0,
    )
    with torch.no_grad():  # the posterior's width is a constant, not learned
        autoencoder.quant_conv.weight[latent_channels:] = 0
        autoencoder.quant_conv.bias[latent_channels:] = 2 * math.log(LATENT_NOISE)
    return autoencoder


def new_schedule() -> DDIMScheduler:
    """Cosine schedule, v-prediction; clipping latents to [-1, 1] would grey every background."""
    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
    )


def new_unet(
    latent_channels: int, widths: tuple[int, ...], text_width: int
) -> UNet2DConditionModel:
    """UNet with cross-attention at its two lower resolutions."""
    return UNet2DConditionModel(
        sample_size=world.SIZE // 8,
        in_channels=latent_channels,
        out_channels=latent_channels,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=widths,
        layers_per_block=1,
        cross_attention_dim=text_width,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def new_clip(tokenizer: CLIPTokenizer, width: int, layers: int) -> CLIPTextModel:
    """CLIP's text transformer."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            hidden_act="quick_gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            attn_implementation="eager",  # torch's CPU flash attention: see bases.FloatAttention
        )
    )


def new_transformer(
    latent_channels: int, width: int, layers: int, text_width: int
) -> ZImageTransformer2DModel:
    """Single-stream transformer over text and 2x2 patches of latents, as in Z-Image."""
    heads = 4
    axis = width // heads // 3 // 2 * 2  # rotary channels of a head for text, rows and columns
    return ZImageTransformer2DModel(
        in_channels=latent_channels,
        dim=width,
        n_layers=layers,
        n_refiner_layers=1,
        n_heads=heads,
        n_kv_heads=heads,
        cap_feat_dim=text_width,
        axes_dims=[width // heads - 2 * axis, axis, axis],
        axes_lens=[1024, 64, 64],
    )


def new_qwen(tokenizer: Qwen2Tokenizer, width: int, layers: int) -> Qwen3Model:
    """Qwen's language model; Z-Image reads what enters its last layer, one after `layers`."""
    return Qwen3Model(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=layers + 1,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=width // 4,
            max_position_embeddings=tokenizer.model_max_length,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            attn_implementation="eager",
        )
    )


def new_flow_schedule() -> FlowMatchEulerDiscreteScheduler:
    """Flow schedule with Z-Image's static shift, read again by the training."""
    return FlowMatchEulerDiscreteScheduler(shift=FLOW_SHIFT)
