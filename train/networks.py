"""The pocket base's networks, their state on disk, and what their training shares."""

import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import world

TOKENS = 32  # prompt length; at 16 the background at the end of a caption was cut off
LATENT_NOISE = 0.03  # standard deviation of the noise the decoder learns to bear


def new_vae() -> AutoencoderKL:
    """Autoencoder: 64x64 pixels to 16x16 latents of 8 channels."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 48, 64),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=world.SIZE,
        scaling_factor=1.0,
    )
    with torch.no_grad():  # the posterior's width is a constant, not learned
        vae.quant_conv.weight[8:] = 0
        vae.quant_conv.bias[8:] = 2 * math.log(LATENT_NOISE)
    return vae


def new_unet() -> UNet2DConditionModel:
    """UNet with cross-attention at its two lower resolutions."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=8,
        out_channels=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 96, 192),
        layers_per_block=1,
        cross_attention_dim=192,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """CLIP's text transformer, two layers deep."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=192,
            intermediate_size=768,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            hidden_act="quick_gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


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


def save_state(
    path: Path, step: int, optimizer: torch.optim.Optimizer, **modules: nn.Module
) -> None:
    """Write modules, Adam moments and the step as one safetensors file, atomically."""
    tensors = {f"{name}/{k}": v for name, m in modules.items() for k, v in m.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{index}/{key}": value for key, value in state.items()}
    tensors = {key: value.contiguous() for key, value in tensors.items()}
    save_file(tensors, path.with_suffix(".tmp"), {"step": str(step)})
    path.with_suffix(".tmp").replace(path)
    path.with_suffix(".json").write_text(json.dumps({"step": step}))


def load_state(path: Path, optimizer: torch.optim.Optimizer | None, **modules: nn.Module) -> int:
    """Restore what `save_state` wrote; returns the step, 0 where there is no file."""
    if not path.exists():
        return 0
    tensors = load_file(path)
    for name, module in modules.items():
        prefix = f"{name}/"
        own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        module.load_state_dict(own)
    if optimizer is not None:
        state: dict[int, dict] = {}
        for key, value in tensors.items():
            if key.startswith("optimizer/"):
                _, index, name = key.split("/")
                state.setdefault(int(index), {})[name] = value
        if state:  # a file without moments is a start from given weights
            optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    return json.loads(path.with_suffix(".json").read_text())["step"]


def set_rate(optimizer: torch.optim.Optimizer, peak: float, step: int, total: int) -> None:
    """Learning rate with a short warm-up, constant to 40 %, then a cosine to zero."""
    progress = max(0.0, (step / total - 0.4) / 0.6)
    rate = peak * min(1.0, (step + 1) / 200) * (0.5 + 0.5 * math.cos(math.pi * min(1.0, progress)))
    for group in optimizer.param_groups:
        group["lr"] = rate


def report(stage: str, step: int, total: int, start: float, done: int, **figures: float) -> None:
    """Print one line of progress with the time that is left."""
    rate = done / (time.time() - start)
    numbers = " ".join(f"{name} {value:.4f}" for name, value in figures.items())
    left = (total - step) / rate / 60
    print(f"{stage} {step}/{total} {numbers} {rate:.2f} steps/s {left:.0f} min left", flush=True)


def as_tensor(images: np.ndarray) -> Tensor:
    """(N, H, W, 3) uint8 to (N, 3, H, W) float in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def as_images(tensor: Tensor) -> np.ndarray:
    """(N, 3, H, W) in [-1, 1] to (N, H, W, 3) uint8."""
    return ((tensor.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
