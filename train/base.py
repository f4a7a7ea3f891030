"""Make the pocket base model: `python train/base.py --work DIR` runs what is missing, in order.

Stages: `vae` (autoencoder), `decoder` (refine it with the latents fixed), `tokenizer`, `latents`
(a pool of encoded scenes), `denoiser` (text encoder and UNet together), `export` (a folder that
`diffusers.StableDiffusionPipeline.from_pretrained` opens). Each stage writes its state into DIR
and continues from there when started again.
"""

import argparse
import json
import math
import re
import time
from pathlib import Path

import numpy as np
import torch
import world
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

TOKENS = 32  # prompt length; at 16 the background at the end of a caption was cut off
LATENT_NOISE = 0.03  # standard deviation of the noise the decoder learns to bear
HERE = Path(__file__).parent


# --- the networks ------------------------------------------------------------------------------


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


# --- state on disk -----------------------------------------------------------------------------


def save_state(path: Path, step: int, optimizer: torch.optim.Optimizer, **modules: nn.Module) -> None:
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


# --- autoencoder -------------------------------------------------------------------------------


def as_tensor(images: np.ndarray) -> Tensor:
    """(N, H, W, 3) uint8 to (N, 3, H, W) float in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def as_images(tensor: Tensor) -> np.ndarray:
    """(N, 3, H, W) in [-1, 1] to (N, H, W, 3) uint8."""
    return ((tensor.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def image_pool(count: int, seed: int) -> np.ndarray:
    """Images for the autoencoder, (count, 64, 64, 3) uint8."""
    sprites = world.all_sprites()
    return np.stack([world.any_image(np.random.default_rng([seed, i]), sprites) for i in range(count)])


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """L1 + MSE + half the L1 of the image gradients."""
    edges = sum((output.diff(dim=d) - target.diff(dim=d)).abs().mean() for d in (-1, -2))
    return F.l1_loss(output, target) + F.mse_loss(output, target) + 0.5 * edges


def psnr(vae: AutoencoderKL, images: np.ndarray) -> float:
    """Mean peak signal-to-noise ratio of reconstructions in dB."""
    target = as_tensor(images)
    with torch.no_grad():
        output = vae.decode(vae.encode(target).latent_dist.mean).sample.clamp(-1, 1)
    return (10 * torch.log10(4 / (output - target).square().mean((1, 2, 3)))).mean().item()


def train_vae(work: Path, steps: int, stage: str = "vae", rate: float = 2e-3) -> None:
    """Train the autoencoder; as stage `decoder` only its decoder, so that latents stay what they are."""
    vae = new_vae().to(memory_format=torch.channels_last)
    if stage == "decoder":
        load_state(work / "vae.safetensors", None, vae=vae)
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    weights = [parameter for parameter in vae.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, rate, betas=(0.9, 0.99), weight_decay=0.0)
    path = work / f"{stage}.safetensors"
    first = load_state(path, optimizer, vae=vae)
    if first >= steps:
        return
    pool, held_out = image_pool(24_000, seed=1), image_pool(200, seed=2)
    start = time.time()
    for step in range(first, steps):
        set_rate(optimizer, rate, step, steps)
        generator = torch.Generator().manual_seed(step)
        images = as_tensor(pool[torch.randint(len(pool), (16,), generator=generator).numpy()])
        images = images.flip(-1) if step % 2 else images
        images = images.to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            latents = vae.encode(images).latent_dist.mean
            noise = torch.randn(latents.shape, generator=generator)
            output = vae.decode(latents + LATENT_NOISE * noise * latents.detach().std()).sample
        loss = reconstruction_loss(output.float(), images) + 1e-3 * latents.float().square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 250 == 0 or step + 1 == steps:
            report(stage, step + 1, steps, start, step + 1 - first, loss=loss.item(), psnr=psnr(vae, held_out))
            save_state(path, step + 1, optimizer, vae=vae)
            show_reconstructions(vae, held_out[:12], work / f"{stage}.png")


def show_reconstructions(vae: AutoencoderKL, images: np.ndarray, path: Path) -> None:
    """Write originals above their reconstructions."""
    with torch.no_grad():
        output = as_images(vae.decode(vae.encode(as_tensor(images)).latent_dist.mean).sample)
    rows = [np.concatenate(list(row), axis=1) for row in (images, output)]
    sheet = Image.fromarray(np.concatenate(rows))
    sheet.resize((sheet.width * 2, sheet.height * 2)).save(path)


# --- text --------------------------------------------------------------------------------------


def make_tokenizer(folder: Path) -> CLIPTokenizer:
    """CLIP tokenizer with a small byte-pair vocabulary: grammar words are whole, any word works."""
    rng = np.random.default_rng(0)
    corpus = [world.scene(rng).caption for _ in range(20_000)]
    corpus += [f"{word} {word}" for name in world.all_names() for word in re.findall("[a-z]+", name)]
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=2000, initial_alphabet=letters, end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator((word for line in corpus for word in line.replace(",", " ,").split()), trainer)
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    words = letters + [f"{letter}</w>" for letter in letters] + ["".join(pair) for pair in merges]
    words = list(dict.fromkeys(words)) + ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = CLIPTokenizer(vocabulary, merges, model_max_length=TOKENS)
    tokenizer.save_pretrained(folder)
    return tokenizer


def token_ids(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Token ids (N, 32)."""
    return tokenizer(
        captions, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt"
    ).input_ids


# --- denoiser ----------------------------------------------------------------------------------


@torch.no_grad()
def standardise(vae: AutoencoderKL, images: np.ndarray) -> None:
    """Fold each latent channel's mean and deviation into the 1x1 convolutions around the latents.

    Afterwards latents have mean 0 and deviation 1, so the pipeline's scaling factor is 1.
    """
    latents = vae.encode(as_tensor(images)).latent_dist.mean
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    vae.quant_conv.weight[:8] /= std[:, None, None, None]
    vae.quant_conv.bias[:8] = (vae.quant_conv.bias[:8] - mean) / std
    vae.post_quant_conv.bias += vae.post_quant_conv.weight[..., 0, 0] @ mean
    vae.post_quant_conv.weight *= std[None, :, None, None]


def load_vae(work: Path) -> AutoencoderKL:
    """The autoencoder with standardised latents: the refined decoder where that stage has run."""
    vae = new_vae()
    refined = work / "decoder.safetensors"
    load_state(refined if refined.exists() else work / "vae.safetensors", None, vae=vae)
    standardise(vae, image_pool(1000, seed=3))
    return vae.eval()


@torch.no_grad()
def encode_pool(work: Path, vae: AutoencoderKL, tokenizer: CLIPTokenizer, count: int) -> dict[str, Tensor]:
    """Latents (N, 8, 16, 16) fp16 and token ids (N, 32) of scenes, kept in `latents.safetensors`."""
    path = work / "latents.safetensors"
    if not path.exists():
        latents, captions = [], []
        for first in range(0, count, 200):
            scenes = [world.scene(np.random.default_rng([4, i])) for i in range(first, first + 200)]
            images = as_tensor(np.stack([scene.image for scene in scenes]))
            latents.append(vae.encode(images).latent_dist.mean.half())
            captions += [scene.caption for scene in scenes]
        save_file({"latents": torch.cat(latents), "ids": token_ids(tokenizer, captions)}, path)
    return load_file(path)


def stratified_timesteps(count: int, generator: torch.Generator) -> Tensor:
    """Timesteps (count,), one from each of `count` equal parts of the schedule, in random order."""
    parts = torch.randperm(count, generator=generator)
    return ((parts + torch.rand(count, generator=generator)) * 1000 / count).long().clamp(max=999)


class Average:
    """Exponential moving average of weights with a warm-up of the decay."""

    def __init__(self, decay: float, **modules: nn.Module):
        self.decay = decay
        self.modules = modules

    @torch.no_grad()
    def update(self, step: int, **modules: nn.Module) -> None:
        """Move towards `modules`' weights."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, module in self.modules.items():
            torch._foreach_lerp_(
                list(module.parameters()), list(modules[name].parameters()), 1 - decay
            )


def train_denoiser(work: Path, steps: int, batch: int, rate: float = 1e-3, scenes: int = 40_000) -> None:
    """Train text encoder and UNet together: v-prediction, min-SNR weight (gamma 5), 10 % no caption."""
    torch.manual_seed(0)
    vae, tokenizer = load_vae(work), CLIPTokenizer.from_pretrained(work / "tokenizer")
    text_encoder, unet, schedule = new_text_encoder(tokenizer), new_unet(), new_schedule()
    text_average, unet_average = new_text_encoder(tokenizer), new_unet()
    text_average.load_state_dict(text_encoder.state_dict())
    unet_average.load_state_dict(unet.state_dict())
    average = Average(0.9993, text_encoder=text_average, unet=unet_average)
    weights = [*unet.parameters(), *text_encoder.parameters()]
    optimizer = torch.optim.AdamW(weights, rate, betas=(0.9, 0.99), weight_decay=0.01, foreach=True)
    parts = {"unet": unet, "text_encoder": text_encoder}
    parts |= {"unet_average": unet_average, "text_average": text_average}
    path = work / "denoiser.safetensors"
    first = load_state(path, optimizer, **parts)
    pool = encode_pool(work, vae, tokenizer, scenes)
    empty = token_ids(tokenizer, [""])[0]
    signal = schedule.alphas_cumprod
    weight = (signal / (1 - signal)).clamp(max=5) / (signal / (1 - signal) + 1)
    start, last_picture, losses = time.time(), time.time(), []
    for step in range(first, steps):
        set_rate(optimizer, rate, step, steps)
        generator = torch.Generator().manual_seed(step)
        chosen = torch.randint(len(pool["latents"]), (batch,), generator=generator)
        latents, ids = pool["latents"][chosen].float(), pool["ids"][chosen]
        ids[torch.rand(batch, generator=generator) < 0.1] = empty
        timesteps = stratified_timesteps(batch, generator)
        noise = torch.randn(latents.shape, generator=generator)
        noisy = schedule.add_noise(latents, noise, timesteps)
        prediction = unet(noisy, timesteps, text_encoder(ids).last_hidden_state).sample
        target = schedule.get_velocity(latents, noise, timesteps)
        error = (prediction - target).square().mean((1, 2, 3))
        loss = (weight[timesteps] * error).mean() / weight.mean()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.update(step, unet=unet, text_encoder=text_encoder)
        losses.append(error.mean().item())
        if (step + 1) % 200 == 0 or step + 1 == steps:
            mean = sum(losses[-200:]) / len(losses[-200:])
            report("denoiser", step + 1, steps, start, step + 1 - first, mse=mean)
        if (step + 1) % 1000 == 0 or step + 1 == steps:
            save_state(path, step + 1, optimizer, **parts)
        if time.time() - last_picture > 600 or step + 1 == steps:
            pipeline = assemble(vae, text_average, tokenizer, unet_average)
            picture_sheet(pipeline, work / f"sheet_{step + 1:06d}.png")
            last_picture = time.time()


def assemble(vae, text_encoder, tokenizer, unet) -> StableDiffusionPipeline:
    """A Stable Diffusion pipeline of the parts."""
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=new_schedule(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def picture_sheet(pipeline: StableDiffusionPipeline, path: Path) -> None:
    """Write a grid of 48 prompts to look at."""
    rng = np.random.default_rng(5)
    prompts = [world.scene(rng).caption for _ in range(24)]
    grounds = list(world.COLOURS)
    prompts += [
        f"{world.article(noun)} on {world.article(grounds[i % 10])} background"
        for i, noun in enumerate(list(world.NOUNS)[:24])
    ]
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        prompts,
        num_inference_steps=25,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(0),
        height=world.SIZE,
        width=world.SIZE,
    ).images
    sheet = Image.new("RGB", (12 * 130, 4 * 130))
    for i, image in enumerate(images):
        sheet.paste(image.resize((128, 128)), (i % 12 * 130, i // 12 * 130))
    sheet.save(path)


# --- export ------------------------------------------------------------------------------------


def export(work: Path, out: Path) -> None:
    """Write the averaged weights in fp16 as a diffusers folder."""
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    text_encoder, unet = new_text_encoder(tokenizer), new_unet()
    state = load_file(work / "denoiser.safetensors")
    for name, module in (("text_average", text_encoder), ("unet_average", unet)):
        prefix = f"{name}/"
        module.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    pipeline = assemble(load_vae(work), text_encoder, tokenizer, unet).to(torch.float16)
    pipeline.save_pretrained(out)


def main() -> None:
    """Run every stage that is not yet done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--work", type=Path, default=HERE.parent / "runs/base", help="state and sheets")
    parser.add_argument("--out", type=Path, default=HERE.parent / "rite_diffusion/backbones/pocket/weights")
    parser.add_argument("--vae-steps", type=int, default=5500)
    parser.add_argument("--decoder-steps", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=16_000, help="steps of the denoiser")
    parser.add_argument("--batch", type=int, default=16)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    world.fetch_emoji()
    train_vae(options.work, options.vae_steps)
    train_vae(options.work, options.decoder_steps, stage="decoder", rate=1e-3)
    if not (options.work / "tokenizer").exists():
        make_tokenizer(options.work / "tokenizer")
    train_denoiser(options.work, options.steps, options.batch)
    export(options.work, options.out)


if __name__ == "__main__":
    main()
