"""Tiny pipelines of the flow-matching families with random weights, from diffusers' own classes."""

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    ChromaPipeline,
    ChromaTransformer2DModel,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    Krea2Pipeline,
    Krea2Transformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers import FlowMatchEulerDiscreteScheduler as Scheduler
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    Qwen3VLConfig,
    Qwen3VLModel,
    T5Config,
    T5EncoderModel,
)

from rite_diffusion.backbones.families import POCKET

CHAT = "{% for m in messages %}user: {{ m['content'] }} end{% endfor %}"
DYNAMIC = {"use_dynamic_shifting": True}
DECODER = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}


def tokenizer(length=77):
    found = CLIPTokenizer.from_pretrained(POCKET / "tokenizer", model_max_length=length)
    found.chat_template = CHAT
    return found


def vae(channels=16, shift=0.1159, scale=0.3611):
    return AutoencoderKL(
        latent_channels=channels, block_out_channels=(4,) * 4, layers_per_block=1,
        norm_num_groups=2, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, scaling_factor=scale, shift_factor=shift,
        use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip


def film_vae():
    return AutoencoderKLQwenImage(
        base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1 * i for i in range(16)], latents_std=[1 + 0.1 * i for i in range(16)],
    )  # fmt: skip


def clip(kind=CLIPTextModel, width=16):
    return kind(
        CLIPTextConfig(
            vocab_size=len(tokenizer()), hidden_size=width, intermediate_size=16,
            num_hidden_layers=2, num_attention_heads=2, projection_dim=width,
        )
    )  # fmt: skip


def t5():
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer()), d_model=32, d_kv=8, d_ff=16, num_layers=1, num_heads=2
        )
    )


def z_image():
    transformer = ZImageTransformer2DModel(
        dim=48, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        axes_dims=[8, 8, 8], axes_lens=[1024, 64, 64],
    )  # fmt: skip
    encoder = Qwen3Model(Qwen3Config(vocab_size=len(tokenizer()), num_hidden_layers=3, **DECODER))
    return ZImagePipeline(Scheduler(shift=3.0), vae(), encoder, tokenizer(512), transformer)


def flux(guidance=True):
    transformer = FluxTransformer2DModel(
        in_channels=64, num_layers=2, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=16,
        guidance_embeds=guidance, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    return FluxPipeline(
        Scheduler(**DYNAMIC), vae(), clip(), tokenizer(), t5(), tokenizer(512), transformer
    )


def chroma():
    transformer = ChromaTransformer2DModel(
        in_channels=64, num_layers=2, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, axes_dims_rope=(4, 4, 8),
        approximator_num_channels=8, approximator_hidden_dim=16, approximator_layers=1,
    )  # fmt: skip
    return ChromaPipeline(Scheduler(shift=1.0), vae(), t5(), tokenizer(512), transformer)


def _flux2_parts(guidance):
    transformer = Flux2Transformer2DModel(
        in_channels=128, num_layers=2, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=48, timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4), guidance_embeds=guidance,
    )  # fmt: skip
    autoencoder = AutoencoderKLFlux2(
        block_out_channels=(4,) * 4, layers_per_block=1, norm_num_groups=2, latent_channels=32
    )
    autoencoder.bn.running_mean.normal_()
    autoencoder.bn.running_var.uniform_(0.5, 2)
    return autoencoder, transformer


def klein(distilled=False):
    autoencoder, transformer = _flux2_parts(guidance=False)
    encoder = Qwen3ForCausalLM(
        Qwen3Config(vocab_size=len(tokenizer()), num_hidden_layers=28, **DECODER)
    )
    return Flux2KleinPipeline(
        Scheduler(**DYNAMIC), autoencoder, encoder, tokenizer(512), transformer, distilled
    )


def flux2_dev():
    """Without its text encoder, a Mistral of 24 billion parameters with a processor."""
    autoencoder, transformer = _flux2_parts(guidance=True)
    return Flux2Pipeline(Scheduler(**DYNAMIC), autoencoder, None, tokenizer(512), transformer)


def qwen_image():
    transformer = QwenImageTransformer2DModel(
        in_channels=64, out_channels=16, num_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    text = {
        "vocab_size": len(tokenizer()), "hidden_size": 32, "intermediate_size": 32,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 2, 4]},
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2,
              "out_hidden_size": 32}  # fmt: skip
    encoder = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    )
    scheduler = Scheduler(
        base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02, **DYNAMIC
    )
    return QwenImagePipeline(scheduler, film_vae(), encoder, tokenizer(1100), transformer)


def krea2(distilled=False):
    transformer = Krea2Transformer2DModel(
        in_channels=64, num_layers=2, attention_head_dim=16, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=64, timestep_embed_dim=32, text_hidden_dim=32,
        num_text_layers=3, text_num_attention_heads=2, text_num_key_value_heads=2,
        text_intermediate_size=32, num_layerwise_text_blocks=1, num_refiner_text_blocks=1,
        axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    text = {
        "vocab_size": len(tokenizer()), "hidden_size": 32, "intermediate_size": 32,
        "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
        "rope_scaling": {"rope_type": "default", "mrope_section": [2, 2, 4]},
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2,
              "out_hidden_size": 32, "deepstack_visual_indexes": [0]}  # fmt: skip
    encoder = Qwen3VLModel(Qwen3VLConfig(text_config=text, vision_config=vision))
    return Krea2Pipeline(
        Scheduler(max_image_seq_len=6400, **DYNAMIC), film_vae(), encoder, tokenizer(512),
        transformer, text_encoder_select_layers=(0, 1, 3), is_distilled=distilled,
    )  # fmt: skip


def sd3():
    transformer = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=16, num_layers=2, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=32, caption_projection_dim=32,
        pooled_projection_dim=32, out_channels=16, pos_embed_max_size=16,
        dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer, Scheduler(shift=3.0), vae(shift=0.0609, scale=1.5305),
        clip(CLIPTextModelWithProjection), tokenizer(), clip(CLIPTextModelWithProjection),
        tokenizer(), t5(), tokenizer(512),
    )  # fmt: skip


def lumina2():
    transformer = Lumina2Transformer2DModel(
        sample_size=16, in_channels=16, hidden_size=24, num_layers=2, num_refiner_layers=1,
        num_attention_heads=2, num_kv_heads=1, multiple_of=16, axes_dim_rope=(4, 4, 4),
        axes_lens=(300, 64, 64), cap_feat_dim=16,
    )  # fmt: skip
    encoder = Gemma2Model(Gemma2Config(vocab_size=len(tokenizer()), num_hidden_layers=2, **DECODER))
    return Lumina2Pipeline(transformer, Scheduler(shift=6.0), vae(), encoder, tokenizer(512))


PIPELINES = {
    "z-image": z_image,
    "flux": flux,
    "chroma": chroma,
    "flux2": klein,
    "qwen-image": qwen_image,
    "krea2": krea2,
    "sd3": sd3,
    "lumina2": lumina2,
}


def with_random_weights(pipeline):
    """The pipeline with every weight away from zero, as diffusers starts some layers at zero."""
    torch.manual_seed(0)
    for weight in pipeline.transformer.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.5 / weight[0].numel() ** 0.5)
    return pipeline
