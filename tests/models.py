"""Random-weight pipelines in the shapes of Stable Diffusion 1.x, 2.x and XL."""

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from rite_diffusion.backbones.clip_tokenizer import clip_tokenizer


def tiny_stable_diffusion(layers_per_block: int = 1) -> StableDiffusionPipeline:
    """About 4 million weights (3 of them token embeddings); pictures 64 px, latents 4 x 8 x 8."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _stable_diffusion(
            pixels=64,
            unet_widths=(32, 64, 64, 64),
            vae_widths=(32, 32, 32, 32),
            layers_per_block=layers_per_block,
            clip={"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2},
            clip_heads=1,
        )


def true_stable_diffusion_15() -> StableDiffusionPipeline:
    """Stable Diffusion 1.5's architecture: 1.07 billion weights, 4.3 GB in fp32."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _stable_diffusion(
            pixels=512,
            unet_widths=(320, 640, 1280, 1280),
            vae_widths=(128, 256, 512, 512),
            layers_per_block=2,
            clip={"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12},
            clip_heads=12,
        )


def _stable_diffusion(
    pixels: int,
    unet_widths: tuple[int, int, int, int],
    vae_widths: tuple[int, int, int, int],
    layers_per_block: int,
    clip: dict[str, int],
    clip_heads: int,
) -> StableDiffusionPipeline:
    unet = UNet2DConditionModel(
        sample_size=pixels // 8,
        block_out_channels=unet_widths,
        layers_per_block=layers_per_block,
        down_block_types=(*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
        up_block_types=("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
        cross_attention_dim=clip["hidden_size"],
        attention_head_dim=8,
    )
    vae = AutoencoderKL(
        sample_size=pixels,
        block_out_channels=vae_widths,
        layers_per_block=layers_per_block,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        latent_channels=4,
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(vocab_size=49408, num_attention_heads=clip_heads, **clip)
    )
    for model in (unet, vae, text_encoder):
        _jitter_vectors(model.eval())
    return StableDiffusionPipeline(
        unet=unet,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=clip_tokenizer(),
        scheduler=_sd1_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def tiny_stable_diffusion_2() -> StableDiffusionPipeline:
    """SD2's shape: linear projections, a text encoder of odd depth, v-prediction; 64 pixels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(32, 32, 64, 64),
            down_block_types=(*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
            up_block_types=("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
            cross_attention_dim=64,
            attention_head_dim=1,
            use_linear_projection=True,
        )
        clip = CLIPTextModel(_clip_config(layers=3))
        vae = _tiny_vae()
    for model in (unet, vae, clip):
        _jitter_vectors(model.eval())
    return StableDiffusionPipeline(
        unet=unet,
        vae=vae,
        text_encoder=clip,
        tokenizer=clip_tokenizer(pad_token="!"),
        scheduler=_sd1_scheduler(prediction_type="v_prediction"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def tiny_stable_diffusion_xl() -> StableDiffusionXLPipeline:
    """SDXL's shape: two text encoders, pooled embedding and sizes, deeper transformers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(32, 64, 64),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 3),
            cross_attention_dim=128,
            attention_head_dim=1,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 64,
        )
        first = CLIPTextModel(_clip_config(layers=2, hidden_act="quick_gelu"))
        second = CLIPTextModelWithProjection(_clip_config(layers=3, projection_dim=64))
        vae = _tiny_vae(scaling_factor=0.13025)
    for model in (unet, vae, first, second):
        _jitter_vectors(model.eval())
    return StableDiffusionXLPipeline(
        unet=unet,
        vae=vae,
        text_encoder=first,
        text_encoder_2=second,
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(pad_token="!"),
        scheduler=_sd1_scheduler(),
    )


def true_stable_diffusion_xl() -> StableDiffusionXLPipeline:
    """Stable Diffusion XL's architecture: 3.5 billion weights, 14 GB in fp32."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            cross_attention_dim=2048,
            attention_head_dim=(5, 10, 20),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
        first = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
        second = {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20}
        return StableDiffusionXLPipeline(
            unet=unet.eval(),
            vae=AutoencoderKL(
                sample_size=1024,
                block_out_channels=(128, 256, 512, 512),
                layers_per_block=2,
                down_block_types=["DownEncoderBlock2D"] * 4,
                up_block_types=["UpDecoderBlock2D"] * 4,
                latent_channels=4,
                scaling_factor=0.13025,
            ).eval(),
            text_encoder=CLIPTextModel(_clip_config(12, "quick_gelu", **first)).eval(),
            text_encoder_2=CLIPTextModelWithProjection(
                _clip_config(32, projection_dim=1280, **second)
            ).eval(),
            tokenizer=clip_tokenizer(),
            tokenizer_2=clip_tokenizer(pad_token="!"),
            scheduler=_sd1_scheduler(),
        )


def _clip_config(layers: int, hidden_act: str = "gelu", **options) -> CLIPTextConfig:
    small = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 1}
    return CLIPTextConfig(
        vocab_size=49408,
        num_hidden_layers=layers,
        hidden_act=hidden_act,
        bos_token_id=49406,
        eos_token_id=49407,
        **small | options,
    )


def _tiny_vae(**options) -> AutoencoderKL:
    return AutoencoderKL(
        sample_size=64,
        block_out_channels=(32, 32, 32, 32),
        layers_per_block=1,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        latent_channels=4,
        **options,
    )


def _sd1_scheduler(**options) -> DDIMScheduler:
    return DDIMScheduler(
        **options,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


@torch.no_grad()
def _jitter_vectors(model: torch.nn.Module) -> None:
    """Moves norms and biases off their common 1 and 0, so that a swapped pair shows."""
    for weight in model.parameters():
        if weight.ndim == 1:
            weight.add_(0.05 * torch.randn_like(weight))
