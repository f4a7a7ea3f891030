"""The base class of flow transformers; each family is a subclass in a module of its own."""

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rite_diffusion.backbones.flow.schedule import (
    TIMES,
    FlowSchedule,
    scheduler_mu,
    scheduler_shift,
)
from rite_diffusion.backbones.parts import PartSource
from rite_diffusion.backbones.pipeline import PipelineBackbone
from rite_diffusion.backbones.protocols import (
    Conditioning,
    Defaults,
    Guidance,
    PredictionType,
    Support,
)
from rite_diffusion.backbones.schedule import FlowSampler
from rite_diffusion.config import MemorySection
from rite_diffusion.errors import ConfigError

GUIDANCE = "guidance"  # of `extra`: the scale that a model with embedded guidance is told
TRAINING_GUIDANCE = 1.0  # that scale while a LoRA trains


def packed(latents: Tensor) -> Tensor:
    """Latents (B, C, h, w) as tokens (B, h w / 4, 4 C), each a square of 2 x 2 cells."""
    return F.pixel_unshuffle(latents, 2).flatten(2).mT


def unpacked(tokens: Tensor, height: int, width: int) -> Tensor:
    """Latents (B, C, height, width) of tokens (B, height width / 4, 4 C)."""
    return F.pixel_shuffle(tokens.mT.unflatten(2, (height // 2, width // 2)), 2)


def chat_tokens(tokenizer: Any, **options: Any) -> int:
    """Tokens of a chat template around an empty message of the user."""
    empty = [{"role": "user", "content": ""}]
    text = tokenizer.apply_chat_template(
        empty, tokenize=False, add_generation_prompt=True, **options
    )
    return len(tokenizer(text).input_ids)


class FlowTransformer(PipelineBackbone, ABC):
    """A flow-matching transformer behind the Backbone protocol; its weights are frozen.

    Latents are (B, C, h, w) in the family's own scaling; only `denoise` converts them to tokens.
    `source` has the weights of parts that the pipeline holds without them.
    """

    family: ClassVar[str]
    block_prefixes: ClassVar[tuple[str, ...]]  # of the paths of blocks within the transformer
    attention_layers: ClassVar[tuple[str, ...]]  # ends of the paths of attention projections
    other_layers: ClassVar[tuple[str, ...]]  # ends of the paths of the blocks' other layers
    multiple: ClassVar[int] = 16
    patch: ClassVar[int] = 2  # latent cells along the side of a token
    denoiser_name = "transformer"
    prediction_type: PredictionType = "flow"
    tokenizer_name: ClassVar[str] = "tokenizer"
    tokens: ClassVar[int] = 512  # that the text encoder reads, those of its template included
    guidance = Guidance()
    support = Support(methods=frozenset({"lora"}), text_encoder=False)
    cross_attentions: Sequence[nn.Module] = ()

    def __init__(
        self,
        pipeline: Any,
        name: str,
        device: torch.device,
        attention: str,
        source: PartSource,
        defaults: Defaults | None = None,
        memory: MemorySection | None = None,
    ):
        super().__init__(pipeline, name, device, attention, source, defaults, memory)
        self.config = pipeline.scheduler.config
        self.noise_schedule = FlowSchedule(self.training_shift, self.patch)

    @property
    def pipeline(self) -> Any:
        """The diffusers pipeline."""
        return self.parts.pipeline

    # --- pictures ------------------------------------------------------------------------------

    @property
    def resolution(self) -> int:
        """Pixels of the native side."""
        return 1024

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        return self.parts.as_it_is("vae").config.latent_channels

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> Tensor:
        """Latents (B, C, h, w), the posterior's mode, of pictures (B, 3, H, W) in [-1, 1]."""
        config = self.vae.config
        latents = self.vae.encode(pixels.to(self.device, self.vae.dtype)).latent_dist.mode()
        return (latents - config.shift_factor) * config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] of latents (B, C, h, w)."""
        config = self.vae.config
        latents = latents.to(self.vae.dtype) / config.scaling_factor + config.shift_factor
        return self.vae.decode(latents, return_dict=False)[0]

    # --- text ----------------------------------------------------------------------------------

    @abstractmethod
    def encode(self, prompts: list[str]) -> Conditioning:
        """Conditioning of prompts, by the pipeline's own encoding; its encoders are present."""

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        """Conditioning of prompts, which are read as they are written: brackets are text."""
        for name in self.text_encoders:
            self.parts[name]  # brought back where it was released
        return self.encode(list(prompts))

    def encoded_length(self, prompts: list[str]) -> int:
        """Tokens of the conditioning of a batch of prompts."""
        return self.encode_prompts(prompts).states.shape[1]

    def encode_captions(self, captions: list[str]) -> Conditioning:
        """Conditioning of training captions."""
        return self.encode_prompts(captions)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the text encoder that reads the whole prompt."""
        return getattr(self.pipeline, self.tokenizer_name)

    @property
    def token_tables(self) -> list[Tensor]:
        """No embeddings: words cannot be learned."""
        return []

    @property
    def text_fingerprint(self) -> str:
        """A name for text encoders, tokenizers, template, length and dtype."""
        return f"{self._text_digest}-{self.family}-{self.tokens}-{self.dtype}".replace("torch.", "")

    @property
    def template_tokens(self) -> int:
        """Tokens of the text encoder's template around a prompt."""
        return len(self.tokenizer("").input_ids)

    @property
    def token_budget(self) -> int:
        """Tokens that a prompt may have, without those of the template."""
        return self.tokens - self.template_tokens

    def token_ids(self, text: str) -> list[int]:
        """The tokens of a text, without begin and end marks."""
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def token_count(self, prompt: str) -> int:
        """Number of the prompt's tokens, without those of the template."""
        return len(self.token_ids(prompt))

    def token_positions(self, prompt: str, word: str) -> list[int]:
        """No positions: ConfigError, as no attention map of a word can be had."""
        raise ConfigError(
            f"{self.name} has no cross-attention to find '{word}' by: give boxes as numbers, and "
            "masks as files."
        )

    def is_known_word(self, word: str) -> bool:
        """Whether the tokenizer holds the word whole, as it does what the model already knows."""
        return word.isalpha() and len(self.token_ids(f" {word}")) == 1

    # --- the transformer -----------------------------------------------------------------------

    @abstractmethod
    def velocity(self, noisy: Tensor, sigma: Tensor, text: Conditioning) -> Tensor:
        """The velocity noise - x_0 (B, C, h, w) at noise levels (B,), in the family's convention.

        Latents and states have the transformer's dtype; with an embedded guidance, `text.extra` has
        its scale as GUIDANCE (B,).
        """

    def denoise(
        self,
        noisy: Tensor,
        times: Tensor,
        conditioning: Conditioning,
        guidance: float | None = None,
    ) -> Tensor:
        """The velocity noise - x_0 (B, C, h, w) at times (B,) in [0, 1000], 1000 sigma."""
        extra = dict(conditioning.extra)
        if self.guidance.kind == "embedded":
            scale = TRAINING_GUIDANCE if guidance is None else guidance
            extra[GUIDANCE] = torch.full((len(noisy),), scale, device=self.device)
        text = Conditioning(conditioning.states.to(self.dtype), extra)
        return self.velocity(noisy.to(self.dtype), times / TIMES, text)

    def training_shift(self, tokens: int) -> float:
        """The s that noise levels are shifted by in training: the scheduler's own."""
        return scheduler_shift(self.config, tokens)

    def sampling_mu(self, tokens: int, steps: int) -> float:
        """The mu for a scheduler with dynamic shifting."""
        return scheduler_mu(self.config, tokens)

    def sampler(self, steps: int, cells: tuple[int, int]) -> FlowSampler:
        """Euler steps on the levels that the family's own pipeline takes."""
        scheduler = FlowSampler.from_config(self.config, stochastic_sampling=False)
        assert isinstance(scheduler, FlowSampler)
        tokens = (cells[0] // self.patch) * (cells[1] // self.patch)
        mu = self.sampling_mu(tokens, steps) if self.config["use_dynamic_shifting"] else None
        scheduler.set_timesteps(steps, device=str(self.device), sigmas=self.sigmas(steps), mu=mu)
        return scheduler

    def sigmas(self, steps: int) -> list[float] | None:
        """The sampler's noise levels before the shift; None: the scheduler's own."""
        return torch.linspace(1, 1 / steps, steps).tolist()

    def compile_denoiser(self, wanted: bool) -> None:
        """Run the transformer's blocks through `torch.compile`, or as they are."""
        if wanted:
            self.transformer.compile_repeated_blocks()
            return
        for module in self.transformer.modules():
            module._compiled_call_impl = None  # torch has no public way back

    # --- adapters ------------------------------------------------------------------------------

    @property
    def transformer(self) -> Any:
        """The denoiser."""
        return self.denoiser

    @property
    def components(self) -> dict[str, nn.Module]:
        """The transformer alone: no text encoder of these families is adapted."""
        return {"transformer": self.transformer}

    def lora_targets(self, component: str, blocks: bool = False) -> list[str]:
        """Paths of the blocks' attention projections, with `blocks` of their other layers too."""
        wanted = self.attention_layers + (self.other_layers if blocks else ())
        return [
            path
            for path, module in self.architecture[component].named_modules()
            if path.startswith(self.block_prefixes)
            and not isinstance(module, nn.ModuleList)
            and path.endswith(tuple(f".{each}" for each in wanted))
            and not self.has_no_effect(path)
        ]

    def has_no_effect(self, path: str) -> bool:
        """Whether a layer changes nothing of a picture, as the last block's text side does."""
        return False

    def is_in_last(self, path: str, blocks: str) -> bool:
        """Whether a path lies in the last of the list of blocks of that name."""
        number = re.search(r"\.(\d+)\.", path)
        count = len(list(self.architecture["transformer"].get_submodule(blocks).children()))
        return number is not None and int(number[1]) == count - 1
