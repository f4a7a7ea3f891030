"""Stable Diffusion 1.x and 2.x, and the pocket base: one CLIP text encoder, UNet, autoencoder."""

from functools import partial
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from torch import Tensor, nn

from rite_diffusion.backbones.chunks import chunks_of, cut_caption
from rite_diffusion.backbones.cross_attention import cross_attentions, select_layer_states
from rite_diffusion.backbones.expansion import Chunked, Expansion
from rite_diffusion.backbones.learned_embeddings import ids_of, positions_of, tokens_of, vectors_in
from rite_diffusion.backbones.parts import PartSource
from rite_diffusion.backbones.pipeline import PipelineBackbone
from rite_diffusion.backbones.prompt_syntax import Section, as_written, read_prompt
from rite_diffusion.backbones.protocols import (
    Conditioning,
    Defaults,
    Guidance,
    PredictionType,
    Support,
)
from rite_diffusion.backbones.schedule import FlowSampler, noise_schedule, prediction_type, sampler
from rite_diffusion.config import MemorySection

Pipeline = StableDiffusionPipeline | StableDiffusionXLPipeline

_CLIP = ("q_proj", "k_proj", "v_proj", "out_proj")
PROJECTIONS = {
    "unet": ("to_q", "to_k", "to_v", "to_out.0"),
    "text_encoder": _CLIP,
    "text_encoder_2": _CLIP,
}
# The other linear layers and convolutions of the UNet's blocks, which LoCon (LyCORIS) adapts too.
BLOCKS = (
    "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "conv_shortcut",
    "time_emb_proj", "downsamplers.0.conv", "upsamplers.0.conv",
)  # fmt: skip


class StableDiffusion(PipelineBackbone):
    """A Stable Diffusion model behind the Backbone protocol; its weights are frozen.

    `source` has the weights of parts that the pipeline holds without them.
    """

    multiple = 8
    denoiser_name = "unet"
    ends = ("conv_in", "conv_out")
    family = "sd"
    guidance = Guidance()
    support = Support()

    def __init__(
        self,
        pipeline: Pipeline,
        name: str,
        device: torch.device,
        attention: str,
        source: PartSource,
        defaults: Defaults | None = None,
        memory: MemorySection | None = None,
    ):
        super().__init__(pipeline, name, device, attention, source, defaults, memory)
        self.tokenizer = pipeline.tokenizer
        self.latent_channels: int = self.denoiser_config.in_channels
        self.prediction_type: PredictionType = prediction_type(pipeline.scheduler, name)
        self.noise_schedule = noise_schedule(pipeline.scheduler, name).to(device)
        self._scheduler_config = pipeline.scheduler.config
        self.resolution: int = self.denoiser_config.sample_size * self.pixels_per_latent
        self._attentions = len(cross_attentions(self.parts.as_it_is("unet")))

    def prepare(self, name: str, part: Any) -> None:
        """Add the hooks for layer-wise embeddings to the UNet's cross-attentions."""
        if name == "unet":
            self._cross_attentions = cross_attentions(part)
            select_layer_states(self._cross_attentions)

    @property
    def cross_attentions(self) -> list[Any]:
        """The cross-attentions (diffusers' `Attention`) in the order of the forward pass."""
        assert self.unet is not None  # loaded
        return self._cross_attentions

    @property
    def unet(self) -> Any:
        """The denoiser, a UNet2DConditionModel."""
        return self.denoiser

    @property
    def components(self) -> dict[str, nn.Module]:
        """The UNet and the text encoders; released encoders may be without weights."""
        parts = self.parts
        return {"unet": self.unet} | {
            name: parts.as_it_is(name) if name in parts.released else parts[name]
            for name in parts.text_names
        }

    @property
    def component_names(self) -> list[str]:
        """The names of `components`."""
        return ["unet", *self.parts.text_names]

    @property
    def text_encoder(self) -> Any:
        """The first text encoder, a CLIPTextModel."""
        return self.parts["text_encoder"]

    @property
    def token_budget(self) -> int:
        """Most tokens of a caption or of a prompt's chunk, without begin and end marks."""
        encoders = [self.parts.as_it_is(name) for name in self.parts.text_names]
        positions = [encoder.config.max_position_embeddings for encoder in encoders]
        lengths = [tokenizer.model_max_length for tokenizer in self._tokenizers]
        return min(*positions, *lengths) - 2

    @property
    def text_fingerprint(self) -> str:
        """An id of text encoders, tokenizers and the dtype, the same for equal weights."""
        return f"{self._text_digest}-{self.dtype}".replace("torch.", "")

    def lora_targets(self, component: str, blocks: bool = False) -> list[str]:
        """Paths of the q, k, v and output projections of every attention in a component.

        With `blocks`, also the paths of the other layers in the UNet's blocks.
        """
        wanted = PROJECTIONS[component]
        if blocks and component == "unet":
            wanted += BLOCKS
        modules = self.architecture[component].named_modules()
        return [path for path, _ in modules if path.endswith(tuple(f".{name}" for name in wanted))]

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> Tensor:
        """Latents (B, C, h, w), means of the posterior, of pictures (B, 3, H, W) in [-1, 1]."""
        pixels = pixels.to(self.device, self.vae.dtype)
        return self.vae.encode(pixels).latent_dist.mean * self.vae.config.scaling_factor

    def compile_denoiser(self, wanted: bool) -> None:
        """Turn `torch.compile` of the UNet on or off."""
        if wanted:
            self.unet.compile()
        else:
            self.unet._compiled_call_impl = None  # PyTorch has no public call to undo `compile`

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] of latents (B, C, h, w)."""
        latents = latents.to(self.vae.dtype) / self.vae.config.scaling_factor
        return self.vae.decode(latents).sample

    @property
    def token_tables(self) -> list[Tensor]:
        """Each text encoder's embeddings (tokens, width)."""
        return [self.text_encoder.get_input_embeddings().weight]

    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        """Conditioning of prompts as users write them: of any length, with weights and BREAK.

        All prompts of a batch have as many chunks as the longest. ConfigError for syntax that is
        not supported.
        """
        return self._encode(*self._read(prompts))

    def encoded_length(self, prompts: list[str]) -> int:
        """Number of tokens in the states that `encode_prompts` returns, found without encoding."""
        return self._expanded(*self._read(prompts)).encoded_length

    def _read(self, prompts: list[str]) -> tuple[list[list[Section]], Chunked]:
        """The prompts' sections, and the function that divides them into chunks."""
        whole = self.protected_words
        sections = [read_prompt(text, whole) for text in prompts]
        return sections, partial(chunks_of, size=self.token_budget, whole=whole)

    def encode_captions(self, captions: list[str]) -> Conditioning:
        """Conditioning of captions, without prompt syntax; tokens beyond the budget are cut off."""
        chunked = partial(cut_caption, size=self.token_budget)
        return self._encode([as_written(text) for text in captions], chunked)

    def _encode(self, prompts: list[list[Section]], chunked: Chunked) -> Conditioning:
        """The text encoder's last hidden states (B, tokens, width).

        They are (B, layers, tokens, width) where a prompt contains a layer-wise embedding.
        """
        expansion = self._expanded(prompts, chunked)
        states = expansion.encode(self.text_encoder, 0).last_hidden_state
        return Conditioning(expansion.gathered(expansion.weighted(states, 0)))

    def _expanded(self, prompts: list[list[Section]], chunked: Chunked) -> Expansion:
        layers, length = self._attentions, self.token_budget + 2
        return Expansion(prompts, self.embeddings, layers, self._tokenizers, length, chunked)

    @property
    def _tokenizers(self) -> list[Any]:
        return [self.tokenizer]

    def token_ids(self, text: str) -> list[int]:
        """The tokens of ordinary text, without begin and end marks."""
        return ids_of(self.tokenizer, text)

    def token_count(self, prompt: str) -> int:
        """Number of the prompt's tokens, begin and end marks excluded."""
        return len(tokens_of(self.tokenizer, prompt, vectors_in([prompt], self.embeddings))[0])

    def token_positions(self, prompt: str, word: str) -> list[int]:
        """Positions of a word's tokens in the encoded prompt, at its first mention."""
        return positions_of(self.tokenizer, prompt, word, self.embeddings, self.token_budget)

    def is_known_word(self, word: str) -> bool:
        """Whether the tokenizer has the word as a single token."""
        return word.isalpha() and len(self.token_ids(word)) == 1

    def denoise(
        self,
        noisy: Tensor,
        times: Tensor,
        conditioning: Conditioning,
        guidance: float | None = None,
    ) -> Tensor:
        """The UNet's prediction (B, C, h, w) for latents at times (B,)."""
        states = conditioning.states.to(self.dtype)
        return self.unet(noisy.to(self.dtype), times, encoder_hidden_states=states).sample

    def sampler(self, steps: int, cells: tuple[int, int]) -> DDIMScheduler | FlowSampler:
        """A deterministic sampler for the model's noise schedule, set to `steps`."""
        scheduler = sampler(self.prediction_type, self._scheduler_config)
        scheduler.set_timesteps(steps, device=self.device)
        return scheduler
