"""The pocket base's tokenizer, text encoder and UNet."""

import json
import re
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor2_0
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizer

import world
from autoencoder import load_vae
from networks import (
    TOKENS,
    as_tensor,
    load_state,
    new_schedule,
    new_text_encoder,
    new_unet,
    report,
    save_state,
    set_rate,
)
from rite_diffusion.training.objective import stratified_timesteps


def make_tokenizer(folder: Path) -> CLIPTokenizer:
    """CLIP tokenizer with a small byte-pair vocabulary: grammar words are whole, any word works."""
    rng = np.random.default_rng(0)
    corpus = [world.scene(rng).caption for _ in range(20_000)]
    corpus += [
        f"{word} {word}" for name in world.all_names() for word in re.findall("[a-z]+", name)
    ]
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=2000, initial_alphabet=letters, end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator(
        (word for line in corpus for word in line.replace(",", " ,").split()), trainer
    )
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


def facts_of(scene: world.Scene) -> list[int]:
    """What a caption says as class numbers: first noun, second noun, colour, place, style."""
    nouns, colours = list(world.NOUNS), list(world.COLOURS)
    second = nouns.index(scene.nouns[1]) + 1 if len(scene.nouns) == 2 else 0
    named = f"{scene.colour} background" in scene.caption
    places = ["on the left", "on the right", "small"]
    said = [place in scene.caption for place in places] if second == 0 else []
    return [
        nouns.index(scene.nouns[0]),
        second,
        colours.index(scene.colour) + 1 if named else 0,
        said.index(True) + 1 if True in said else 0,
        int(scene.caption.startswith("3d")),
    ]


def teach_text_encoder(
    text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, steps: int, rate: float = 1e-3
) -> None:
    """Train the text encoder alone, as Stable Diffusion's was, so that its states say all.

    At the end mark and at every padding position the state should point to the caption's facts,
    each a fixed random direction. The directions are fixed so that the states must move: readouts
    that learn were content with states that differ by 3 % from noun to noun, and from such states
    the UNet learned every background and, in 60 k images, not one object.
    """
    scenes = [world.scene(np.random.default_rng([6, i])) for i in range(12_000)]
    ids = token_ids(tokenizer, [scene.caption for scene in scenes])
    facts = torch.tensor([facts_of(scene) for scene in scenes])
    sizes = (len(world.NOUNS), len(world.NOUNS) + 1, len(world.COLOURS) + 1, 4, 2)
    width = text_encoder.config.hidden_size
    draws = torch.randn(sum(sizes), width, generator=torch.Generator().manual_seed(0))
    directions = F.normalize(draws, dim=-1)
    weights = list(text_encoder.parameters())
    optimizer = torch.optim.AdamW(weights, rate, betas=(0.9, 0.99), weight_decay=0.01)
    start = time.time()
    for step in range(steps):
        set_rate(optimizer, rate, step, steps)
        chosen = torch.randint(len(ids), (128,), generator=torch.Generator().manual_seed(step))
        states = text_encoder(ids[chosen]).last_hidden_state  # (B, 32, 192)
        ended = ids[chosen] == tokenizer.eos_token_id  # (B, 32)
        answers = (states[ended] @ directions.T).split(sizes, dim=-1)
        wanted = facts[chosen].repeat_interleave(ended.sum(1), dim=0)  # (positions, 5)
        loss = sum(F.cross_entropy(a, w) for a, w in zip(answers, wanted.T, strict=True))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 50 == 0:
            right = (answers[0].argmax(-1) == wanted[:, 0]).float().mean().item()
            report("text", step + 1, steps, start, step + 1, loss=loss.item(), noun=right)


@torch.no_grad()
def encode_pool(
    work: Path, vae: AutoencoderKL, tokenizer: CLIPTokenizer, count: int
) -> dict[str, Tensor]:
    """Latents (N, 8, 16, 16) fp16, token ids (N, 32) and which are pairs (N,), made once."""
    path = work / "latents.safetensors"
    if not path.exists():
        latents, captions = [], []
        for first in range(0, count, 200):
            scenes = [world.scene(np.random.default_rng([4, i])) for i in range(first, first + 200)]
            images = as_tensor(np.stack([scene.image for scene in scenes]))
            latents.append(vae.encode(images).latent_dist.mean.half().contiguous())
            captions += [scene.caption for scene in scenes]
        save_file(
            {"latents": torch.cat(latents).contiguous(), "ids": token_ids(tokenizer, captions)},
            path,
        )
    pool = load_file(path)
    return pool | {"pairs": show_pairs(tokenizer, pool["ids"])}


@torch.no_grad()
def encode_captions(text_encoder: CLIPTextModel, ids: Tensor) -> Tensor:
    """States (N, 32, 192) fp16 of a frozen text encoder for token ids (N, 32)."""
    return torch.cat([text_encoder(part).last_hidden_state.half() for part in ids.split(500)])


class FloatAttention(AttnProcessor2_0):
    """Attention in float32 inside bf16 autocast.

    On processors with AMX, bf16 makes convolutions twice as fast, but the backward pass of torch
    2.13's CPU flash attention in bf16 takes 13 times its float32 time, which undid all of it.
    """

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **arguments):
        """Attention as diffusers computes it, in float32."""
        with torch.autocast("cpu", enabled=False):
            if encoder_hidden_states is not None:
                encoder_hidden_states = encoder_hidden_states.float()
            return super().__call__(attn, hidden_states.float(), encoder_hidden_states, **arguments)


@torch.no_grad()
def update_average(average: nn.Module, module: nn.Module, step: int, decay: float) -> None:
    """Move an exponential moving average of weights on; its decay grows over the first steps."""
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.parameters()), list(module.parameters()), 1 - decay)


def show_pairs(tokenizer: CLIPTokenizer, ids: Tensor) -> Tensor:
    """Which captions (N,) name two objects."""
    joining = torch.tensor(tokenizer("and beside").input_ids[1:3])
    return torch.isin(ids, joining).any(1)


def draw_scenes(are_pairs: Tensor, count: int, pairs: float, generator: torch.Generator) -> Tensor:
    """Indices (count,) of scenes, a share `pairs` of them of two objects."""
    kinds = torch.rand(count, generator=generator) < pairs
    places = torch.rand(count, generator=generator)
    two, one = are_pairs.nonzero().squeeze(-1), (~are_pairs).nonzero().squeeze(-1)
    return torch.where(kinds, two[(places * len(two)).long()], one[(places * len(one)).long()])


def train_denoiser(
    work: Path,
    steps: int,
    batch: int = 64,
    rate: float = 6e-4,
    scenes: int = 32_000,
    pairs: float = 0.3,
    decay: float = 0.9993,
) -> None:
    """Train the UNet: v-prediction, a tenth of the scenes without their caption.

    A share `pairs` of the scenes shows two objects; `decay` is that of the weights' average.

    The weight of the clean latents' error is min(SNR + 1, 6). Min-SNR's min(SNR, 5) all but drops
    the noisiest steps, which is where a caption decides what will be drawn: with it, 32 k images
    taught every background and not one object.
    """
    torch.manual_seed(0)
    vae, tokenizer = load_vae(work), CLIPTokenizer.from_pretrained(work / "tokenizer")
    text_encoder, unet, schedule = new_text_encoder(tokenizer), new_unet(), new_schedule()
    path = work / "denoiser.safetensors"
    if not path.exists():
        teach_text_encoder(text_encoder, tokenizer, steps=400)
    text_encoder.requires_grad_(False)
    unet_average = new_unet()
    unet_average.load_state_dict(unet.state_dict())
    weights = list(unet.parameters())
    optimizer = torch.optim.AdamW(weights, rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    parts = {"unet": unet, "text_encoder": text_encoder, "unet_average": unet_average}
    first = load_state(path, optimizer, **parts)
    pool = encode_pool(work, vae, tokenizer, scenes)
    states = encode_captions(text_encoder, pool["ids"])
    empty = encode_captions(text_encoder, token_ids(tokenizer, [""]))[0]
    unet.set_attn_processor(FloatAttention())
    snr = schedule.alphas_cumprod / (1 - schedule.alphas_cumprod)
    weight = (snr + 1).clamp(max=6) / (snr + 1)
    start, last_picture, losses = time.time(), time.time(), []
    for step in range(first, steps):
        set_rate(optimizer, rate, step, steps)
        generator = torch.Generator().manual_seed(step)
        chosen = draw_scenes(pool["pairs"], batch, pairs, generator)
        latents, context = pool["latents"][chosen].float(), states[chosen].float()
        context[torch.rand(batch, generator=generator) < 0.1] = empty.float()
        timesteps = stratified_timesteps(batch, 1000, generator, None)
        noise = torch.randn(latents.shape, generator=generator)
        noisy = schedule.add_noise(latents, noise, timesteps)
        with torch.autocast("cpu", torch.bfloat16):
            prediction = unet(noisy, timesteps, context).sample
        target = schedule.get_velocity(latents, noise, timesteps)
        error = (prediction.float() - target).square().mean((1, 2, 3))
        loss = (weight[timesteps] * error).mean() / weight.mean()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        update_average(unet_average, unet, step, decay)
        losses.append(error.mean().item())
        if (step + 1) % 200 == 0 or step + 1 == steps:
            mean = sum(losses[-200:]) / len(losses[-200:])
            report("denoiser", step + 1, steps, start, step + 1 - first, mse=mean)
        if (step + 1) % 250 == 0 or step + 1 == steps:
            save_state(path, step + 1, optimizer, **parts)
        if time.time() - last_picture > 600 or step + 1 == steps:
            pipeline = assemble(vae, text_encoder, tokenizer, unet_average)
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
