"""The two embedded bases: what differs between a UNet and a flow transformer.

A base knows its tokenizer, text encoder and denoiser, how noisy latents and the denoiser's target
are made, and the diffusers pipeline that opens it. `denoiser.train` does the rest.
"""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    StableDiffusionPipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor, nn

from . import canvas, networks, text
from .machine import Machine

States = list[Tensor]  # text states of each caption, (tokens, width)


@dataclass(frozen=True)
class Sizes:
    """The sizes of a base's networks."""

    unet_widths: tuple[int, ...]
    width: int  # of the transformer
    layers: int  # of the transformer
    text_width: int
    text_layers: int  # whose states are read


class Base(Protocol):
    """What `denoiser.train` asks of a base."""

    text_encoder: nn.Module
    denoiser: nn.Module

    def taught_states(self, captions: list[str]) -> text.Taught:
        """The states of captions that the text encoder's training looks at."""
        ...

    def states(self, captions: list[str]) -> States:
        """What the denoiser reads of each caption, on the CPU in fp16."""
        ...

    def errors(self, latents: Tensor, states: States, generator: torch.Generator) -> Tensor:
        """The weighted squared error (n,) of the denoiser on latents with noise drawn here."""
        ...

    def pipeline(self, autoencoder: AutoencoderKL, denoiser: nn.Module) -> DiffusionPipeline:
        """The pipeline of the base with given denoiser."""
        ...


def evenly_spread(count: int, generator: torch.Generator) -> Tensor:
    """Numbers (count,) in [0, 1), one in each of `count` equal parts, in random order."""
    places = torch.arange(count) + torch.rand(count, generator=generator)
    return (places / count)[torch.randperm(count, generator=generator)]


class FloatAttention(AttnProcessor2_0):
    """Attention in float32 inside bf16 autocast.

    The backward pass of torch 2.13's CPU flash attention in bf16 takes 13 times its float32 time.
    """

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **arguments):
        """Attention as diffusers computes it, in float32."""
        with torch.autocast("cpu", enabled=False):
            if encoder_hidden_states is not None:
                encoder_hidden_states = encoder_hidden_states.float()
            return super().__call__(attn, hidden_states.float(), encoder_hidden_states, **arguments)


class UNetBase:
    """Stable Diffusion's anatomy: CLIP, a UNet with cross-attention, v-prediction."""

    def __init__(self, folder: Path, channels: int, sizes: Sizes, machine: Machine) -> None:
        self.machine = machine
        self.tokenizer = text.clip_tokenizer(folder / "unet-tokenizer")
        self.text_encoder = networks.new_clip(
            self.tokenizer, sizes.text_width, sizes.text_layers
        ).to(machine.device)
        unet = networks.new_unet(channels, sizes.unet_widths, sizes.text_width)
        self.denoiser = unet.to(machine.device, memory_format=torch.channels_last)
        if machine.uses_bf16 and machine.device.type == "cpu":
            self.denoiser.set_attn_processor(FloatAttention())
        self.schedule = networks.new_schedule()

    def _ids(self, captions: list[str]) -> Tensor:
        found = self.tokenizer(
            captions,
            padding="max_length",
            max_length=text.TOKENS,
            truncation=True,
            return_tensors="pt",
        )
        return found.input_ids.to(self.machine.device)

    def taught_states(self, captions: list[str]) -> text.Taught:
        """The end mark and the first padding (the same token) speak; the last states show."""
        ids = self._ids(captions)
        states = self.text_encoder(ids).last_hidden_state
        ended = ids[:, : text.WORDS] == self.tokenizer.eos_token_id
        words, picture = states[:, : text.WORDS], states[:, text.WORDS :]
        return text.Taught(words[ended], ended.nonzero()[:, 0], picture)

    @torch.no_grad()
    def states(self, captions: list[str]) -> States:
        """The last hidden states, (TOKENS, width) each."""
        return list(self.text_encoder(self._ids(captions)).last_hidden_state.half().cpu())

    def errors(self, latents: Tensor, states: States, generator: torch.Generator) -> Tensor:
        """Velocity errors; in terms of clean latents they weigh min(SNR + 1, 6).

        Min-SNR's min(SNR, 5) all but drops the noisiest steps, which is where a caption decides
        what will be drawn: with it, 32,000 pictures taught every background and not one object.
        """
        device = latents.device
        timesteps = (1000 * evenly_spread(len(latents), generator)).long()
        noise = torch.randn(latents.shape, generator=generator).to(device)
        snr = self.schedule.alphas_cumprod / (1 - self.schedule.alphas_cumprod)
        weight = (snr + 1).clamp(max=6) / (snr + 1)
        weight = (weight / weight.mean())[timesteps].to(device)
        timesteps = timesteps.to(device)
        noisy = self.schedule.add_noise(latents, noise, timesteps)
        context = torch.stack(states).to(device, torch.float32)
        with self.machine.autocast():
            prediction = self.denoiser(noisy, timesteps, context).sample
        target = self.schedule.get_velocity(latents, noise, timesteps)
        return weight * (prediction.float() - target).square().mean((1, 2, 3))

    def pipeline(self, autoencoder: AutoencoderKL, denoiser: nn.Module) -> DiffusionPipeline:
        """A Stable Diffusion pipeline."""
        return StableDiffusionPipeline(
            vae=autoencoder,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            unet=denoiser,
            scheduler=networks.new_schedule(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


def _quicken(transformer: ZImageTransformer2DModel) -> None:
    """Compile the blocks, and keep off torch's flash attention (see FloatAttention).

    On a CPU with AMX: 56 pictures a second through a training step instead of 25. The compiled
    UNet is slower than the plain one, and its losses are NaN.
    """
    transformer.set_attention_backend("_native_math")
    blocks = (transformer.noise_refiner, transformer.context_refiner, transformer.layers)
    for block in itertools.chain(*blocks):
        block.compile(dynamic=False)


class FlowBase:
    """Z-Image's anatomy: a small Qwen, a single-stream transformer, a flow from noise."""

    def __init__(self, folder: Path, channels: int, sizes: Sizes, machine: Machine) -> None:
        self.machine = machine
        self.tokenizer = text.qwen_tokenizer(folder / "flow-tokenizer")
        self.text_encoder = networks.new_qwen(
            self.tokenizer, sizes.text_width, sizes.text_layers
        ).to(machine.device)
        transformer = networks.new_transformer(
            channels, sizes.width, sizes.layers, sizes.text_width
        )
        self.denoiser = transformer.to(machine.device)
        if machine.uses_bf16 and machine.device.type == "cpu":
            _quicken(transformer)

    def _read(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """States (n, tokens, width) of captions in the chat template, and which are no padding."""
        prompts = [
            self.tokenizer.apply_chat_template(
                [{"role": "user", "content": caption}], tokenize=False, add_generation_prompt=True
            )
            for caption in captions
        ]
        found = self.tokenizer(prompts, padding=True, return_tensors="pt").to(self.machine.device)
        output = self.text_encoder(**found, output_hidden_states=True)
        return output.hidden_states[-2], found.attention_mask.bool()

    def taught_states(self, captions: list[str]) -> text.Taught:
        """The template's last words have read the caption and speak; its patch tokens show."""
        states, real = self._read(captions)
        left = real.flip(1).cumsum(1).flip(1)  # tokens from here to the end
        shows = real & (left <= canvas.PATCHES)
        speaks = real & (left > canvas.PATCHES) & (left <= canvas.PATCHES + 3)
        picture = states[shows].unflatten(0, (len(captions), canvas.PATCHES))
        return text.Taught(states[speaks], speaks.nonzero()[:, 0], picture)

    @torch.no_grad()
    def states(self, captions: list[str]) -> States:
        """The states that enter the last layer, (tokens, width) each, as Z-Image reads them."""
        states, real = self._read(captions)
        return [s[mask].half().cpu() for s, mask in zip(states, real, strict=True)]

    def errors(self, latents: Tensor, states: States, generator: torch.Generator) -> Tensor:
        """Errors of the flow at noise levels of a logit-normal density, shifted towards noise."""
        normal = torch.special.ndtri(evenly_spread(len(latents), generator).clamp(1e-4, 1 - 1e-4))
        sigma = torch.sigmoid(normal)
        shift = networks.FLOW_SHIFT
        sigma = (shift * sigma / (1 + (shift - 1) * sigma)).to(latents.device)
        noise = torch.randn(latents.shape, generator=generator).to(latents.device)
        part = sigma[:, None, None, None]
        noisy = (1 - part) * latents + part * noise
        context = [state.to(latents.device, torch.float32) for state in states]
        with self.machine.autocast():
            outputs = self.denoiser(list(noisy.unsqueeze(2)), 1 - sigma, context).sample
        prediction = -torch.stack(list(outputs)).squeeze(2).float()
        return (prediction - (noise - latents)).square().mean((1, 2, 3))

    def pipeline(self, autoencoder: AutoencoderKL, denoiser: nn.Module) -> DiffusionPipeline:
        """A Z-Image pipeline."""
        return ZImagePipeline(
            scheduler=networks.new_flow_schedule(),
            vae=autoencoder,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            transformer=denoiser,
        )


BASES = {"unet": UNetBase, "flow": FlowBase}
GUIDANCE = {"unet": 3.0, "flow": 2.0}  # Z-Image adds 1 to what it is given
