"""A Stable Diffusion 1.x, 2.x or XL pipeline from one .safetensors file in the original layout.

Nothing is downloaded: sizes are read from the tensors' shapes, so models of any width load. The
rest is assumed to be as in the published models: 8 attention heads in SD1's UNet and heads of 64
channels elsewhere, norms over 32 groups, the scale of latents, the pictures' size, the noise
schedule, and v-prediction for SD2.
"""

import re
from collections.abc import Callable, Sequence
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from torch import Tensor

from rite_diffusion.backbones.checkpoint import (
    SD1,
    SD2,
    SDXL,
    UNET,
    VAE,
    XL_CLIP,
    XL_OPEN_CLIP,
    Checkpoint,
    check_parts,
    layout_of,
    load_weights,
    read_header,
)
from rite_diffusion.backbones.clip_tokenizer import clip_tokenizer
from rite_diffusion.backbones.stable_diffusion import Pipeline
from rite_diffusion.backbones.text_checkpoint import (
    load_clip,
    load_open_clip,
    load_projected_clip,
    text_config,
)
from rite_diffusion.errors import BackboneError

Config = dict[str, Any]

TOKENS, POSITIONS = 49408, 77  # of CLIP's tokenizer
LENGTH = "max_position_embeddings"


class SingleFile:
    """The parts of a `.safetensors` checkpoint, with weights in `dtype`, in eval mode.

    Raises BackboneError where the file is damaged, a pickle or another kind of model, or where
    tensors are missing, unexpected or of another shape.
    """

    def __init__(self, path: Path, dtype: torch.dtype):
        checkpoint = read_header(path)
        self.layout = check_parts(checkpoint)
        unet, vae = unet_config(checkpoint), vae_config(checkpoint)
        self.texts = {start: text_config(checkpoint, start) for start in self.layout.encoders}
        check_sizes(path, unet, vae, list(self.texts.values()))
        self.scheduler = noise_schedule(checkpoint)
        self._loaders: dict[str, Callable[[], Any]] = {
            "unet": partial(_load_unet, checkpoint, unet, dtype),
            "vae": partial(_load_vae, checkpoint, vae, dtype),
        }
        if self.layout is SDXL:
            first, second = self.texts[XL_CLIP], self.texts[XL_OPEN_CLIP]
            self._loaders |= {
                "text_encoder": partial(load_clip, checkpoint, first, dtype, XL_CLIP),
                "text_encoder_2": partial(load_projected_clip, checkpoint, second, dtype),
            }
        else:
            load = load_open_clip if self.layout is SD2 else load_clip
            [config] = self.texts.values()
            self._loaders["text_encoder"] = partial(load, checkpoint, config, dtype)

    @property
    def names(self) -> list[str]:
        """The names of the parts."""
        return list(self._loaders)

    def load(self, name: str) -> Any:
        """A part with its weights in main memory."""
        return self._loaders[name]()

    def weights(self, name: str, paths: Sequence[str]) -> None:
        """None: the file's layers have other names."""
        return


def load_single_file(path: Path, dtype: torch.dtype = torch.float32) -> Pipeline:
    """The pipeline of a `.safetensors` checkpoint, with weights in `dtype`, in eval mode.

    Raises BackboneError as `SingleFile`.
    """
    file = SingleFile(path, dtype)
    parts: dict[str, Any] = {name: file.load(name) for name in file.names}
    parts["scheduler"] = file.scheduler
    lengths = [config[LENGTH] for config in file.texts.values()]
    if file.layout is SDXL:
        return StableDiffusionXLPipeline(
            tokenizer=clip_tokenizer(length=lengths[0]),
            tokenizer_2=clip_tokenizer(pad_token="!", length=lengths[1]),
            **parts,
        )
    pad = {"pad_token": "!"} if file.layout is SD2 else {}
    return StableDiffusionPipeline(
        tokenizer=clip_tokenizer(length=lengths[0], **pad),
        **parts,
        safety_checker=None,  # pyright: ignore[reportArgumentType]
        feature_extractor=None,  # pyright: ignore[reportArgumentType]
        requires_safety_checker=False,
    )


def unet_config(checkpoint: Checkpoint) -> Config:
    """Arguments of UNet2DConditionModel.

    `input_blocks` lists conv_in, then the resnets of each level and, except for the last level, a
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
    widths = tuple(checkpoint.shape(resnet.format(i))[0] for i in firsts)
    depth = UNET + "input_blocks.{}.1.transformer_blocks."
    config = {
        "in_channels": checkpoint.shape(f"{UNET}input_blocks.0.0.weight")[1],
        "out_channels": checkpoint.shape(f"{UNET}out.2.weight")[0],
        "block_out_channels": widths,
        "layers_per_block": layers,
        "down_block_types": tuple(f"{kind}DownBlock2D" for kind in kinds),
        "up_block_types": tuple(f"{kind}UpBlock2D" for kind in reversed(kinds)),
        "cross_attention_dim": checkpoint.shape(states)[1],
        "attention_head_dim": 8,  # diffusers' name for the number of heads
        "sample_size": picture_size(checkpoint) // 2 ** (vae_levels(checkpoint) - 1),
    }
    if layout_of(checkpoint) is SD1:
        return config
    depths = [max(checkpoint.length(depth.format(first) + "{}."), 1) for first in firsts]
    config |= {
        "use_linear_projection": True,
        "attention_head_dim": tuple(max(width // 64, 1) for width in widths),
        "transformer_layers_per_block": tuple(depths),
    }
    return config | (_size_embedding(checkpoint) if layout_of(checkpoint) is SDXL else {})


def _size_embedding(checkpoint: Checkpoint) -> Config:
    """Arguments for SDXL's embedding of the pooled text and of six sizes."""
    inputs = checkpoint.shape(f"{UNET}label_emb.0.0.weight")[1]
    pooled = checkpoint.shape(f"{XL_OPEN_CLIP}text_projection")[1]
    return {
        "addition_embed_type": "text_time",
        "projection_class_embeddings_input_dim": inputs,
        "addition_time_embed_dim": (inputs - pooled) // 6,
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
        "scaling_factor": layout_of(checkpoint).latent_scale,
        "sample_size": picture_size(checkpoint),
    }


def vae_levels(checkpoint: Checkpoint) -> int:
    """Number of resolutions in the autoencoder; it halves the picture between them."""
    checkpoint.shape(f"{VAE}encoder.down.0.block.0.conv1.weight")
    return checkpoint.length(VAE + "encoder.down.{}.")


def picture_size(checkpoint: Checkpoint) -> int:
    """Side in pixels of the pictures that the model was trained on, by the file or its family.

    The file states it under a key of Stability's ModelSpec, which trainers such as kohya's write.
    """
    stated = re.fullmatch(r"(\d{2,4})x\d{2,4}", checkpoint.metadata.get("modelspec.resolution", ""))
    return int(stated[1]) if stated else layout_of(checkpoint).pixels


def check_sizes(path: Path, unet: Config, vae: Config, texts: list[Config]) -> None:
    """Raise BackboneError where the parts do not fit each other or are not text-to-image."""
    channels, latents = unet["in_channels"], vae["latent_channels"]
    attended, states = unet["cross_attention_dim"], sum(clip["hidden_size"] for clip in texts)
    widths = {*unet["block_out_channels"], *vae["block_out_channels"]}
    tokens = min(clip["vocab_size"] for clip in texts)
    positions = min(clip["max_position_embeddings"] for clip in texts)
    odd = [c["hidden_size"] for c in texts if c["hidden_size"] % c["num_attention_heads"]]
    odd_widths = " and ".join(map(str, odd))
    faults = [
        (channels == 9, "it is an inpainting model (9 input channels)"),
        (channels != latents, f"its UNet takes {channels} channels, its latents have {latents}"),
        (attended != states, f"its UNet reads text of width {attended}, its CLIP gives {states}"),
        (any(width % 32 for width in widths), f"widths {widths} are not all multiples of 32"),
        (bool(odd), f"CLIP's width {odd_widths} is not a multiple of 64"),
        (tokens < TOKENS, f"it knows {tokens} tokens, CLIP's tokenizer {TOKENS}"),
        (positions < POSITIONS, f"it reads {positions} tokens, CLIP's tokenizer gives {POSITIONS}"),
    ]
    for found, fault in faults:
        if found:
            raise BackboneError(
                f"{path} is not a Stable Diffusion that this toolkit can train: {fault}. "
                "Pass another checkpoint, or the model's diffusers folder."
            )


def noise_schedule(checkpoint: Checkpoint) -> DDIMScheduler:
    """The published scheduler; tensors `v_pred` and `ztsnr` set its prediction and terminal SNR."""
    default = "v" if layout_of(checkpoint) is SD2 else "epsilon"
    stated = checkpoint.metadata.get("modelspec.prediction_type", default)
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
    return load_weights(model, part, weights, checkpoint.path)


def _load_vae(checkpoint: Checkpoint, config: Config, dtype: torch.dtype) -> AutoencoderKL:
    part = checkpoint.read(VAE, dtype)
    with init_empty_weights():
        model = AutoencoderKL(**config)
    weights = _converted(convert_ldm_vae_checkpoint, part, config, checkpoint.path)
    return load_weights(model, part, weights, checkpoint.path)


def _converted(
    convert: Callable, part: dict[str, Tensor], config: Config, path: Path
) -> dict[str, Tensor]:
    """The file's `part` under diffusers' names; BackboneError where a tensor is missing.

    Where an up- or downsampler lacks its bias, the converters raise KeyError or return None for it.
    """
    try:
        weights = convert(part, config)
    except KeyError as error:
        raise BackboneError(f"{path} lacks the tensor {error}. Download it again.") from None
    return {name: tensor for name, tensor in weights.items() if tensor is not None}
