"""FLUX.2 (Black Forest Labs 2025): klein with a Qwen3 text encoder, dev with Mistral's."""

from dataclasses import replace
from typing import Any

import torch
from diffusers.pipelines.flux2.pipeline_flux2 import format_input
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from torch import Tensor
from torch.nn import functional as F

from rite_diffusion.backbones.flow.flux import TEXT_LAYERS
from rite_diffusion.backbones.flow.schedule import scheduler_shift
from rite_diffusion.backbones.flow.transformer import GUIDANCE, FlowTransformer, chat_tokens
from rite_diffusion.backbones.protocols import Conditioning, Defaults, Guidance, JointAttention


class Flux2(FlowTransformer):
    """FLUX.2 klein (base and distilled) and dev.

    Latents are the autoencoder's with each square of 2 x 2 cells as one cell of four times the
    channels, normalised by the autoencoder's batch statistics: one cell is one token.
    """

    family = "flux2"
    block_prefixes = ("transformer_blocks.", "single_transformer_blocks.")
    attention_layers = (
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
        "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
        "attn.to_qkv_mlp_proj", "attn.to_out",
    )  # fmt: skip
    other_layers = (
        "ff.linear_in",
        "ff.linear_out",
        "ff_context.linear_in",
        "ff_context.linear_out",
    )
    ends = ("x_embedder", "proj_out")
    patch = 1
    joint_attention = JointAttention(text_first=True, patch=1, text_layers=TEXT_LAYERS)
    own_defaults = Defaults(steps=50, guidance=4.0)

    def __init__(self, pipeline: Any, *arguments: Any, **options: Any):
        super().__init__(pipeline, *arguments, **options)
        if self.denoiser_config.guidance_embeds:
            self.guidance = Guidance("embedded")
        elif pipeline.config.get("is_distilled"):
            self.guidance = Guidance("none")
            self.defaults = options.get("defaults") or Defaults(steps=4, guidance=1.0)
            self.support = replace(
                self.support, distilled="train on FLUX.2-klein-base-4B or FLUX.2-klein-base-9B"
            )

    @property
    def latent_channels(self) -> int:
        """Channels of the latents: four cells of the autoencoder's."""
        return 4 * super().latent_channels

    @property
    def pixels_per_latent(self) -> int:
        """Pixels along one side of a latent cell."""
        return 2 * super().pixels_per_latent

    def _statistics(self) -> tuple[Tensor, Tensor]:
        norm, margin = self.vae.bn, self.vae.config.batch_norm_eps
        mean, variance = norm.running_mean.view(1, -1, 1, 1), norm.running_var.view(1, -1, 1, 1)
        return mean.to(self.device), (variance + margin).sqrt().to(self.device)

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> Tensor:
        """Normalised latents (B, 128, h, w) of pictures (B, 3, 16 h, 16 w) in [-1, 1]."""
        latents = self.vae.encode(pixels.to(self.device, self.vae.dtype)).latent_dist.mode()
        mean, deviation = self._statistics()
        return (F.pixel_unshuffle(latents, 2) - mean) / deviation

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (B, 3, 16 h, 16 w) in [-1, 1] of normalised latents (B, 128, h, w)."""
        mean, deviation = self._statistics()
        latents = latents.to(self.vae.dtype) * deviation + mean
        return self.vae.decode(F.pixel_shuffle(latents, 2), return_dict=False)[0]

    @property
    def tokenizer(self) -> Any:
        """The tokenizer; that of dev lies within a processor."""
        found = self.pipeline.tokenizer
        return getattr(found, "tokenizer", found)

    @property
    def template_tokens(self) -> int:
        """Tokens of the chat template around a prompt, with dev's system message."""
        if self.guidance.kind != "embedded":
            return chat_tokens(self.tokenizer, enable_thinking=False)
        message = format_input([""], self.pipeline.system_message)[0]
        return len(self.tokenizer.apply_chat_template(message, tokenize=True))

    def encode(self, prompts: list[str]) -> Conditioning:
        """States of several layers side by side, of a fixed number of tokens, padding attended."""
        states, _ = self.pipeline.encode_prompt(
            prompts, self.device, max_sequence_length=self.tokens
        )
        return Conditioning(states)

    def velocity(self, noisy: Tensor, sigma: Tensor, text: Conditioning) -> Tensor:
        """The velocity noise - x_0 (B, 128, h, w) at noise levels (B,)."""
        tokens = self.transformer(
            hidden_states=noisy.flatten(2).mT,
            timestep=sigma.to(self.dtype),
            guidance=text.extra.get(GUIDANCE),
            encoder_hidden_states=text.states,
            txt_ids=self.pipeline._prepare_text_ids(text.states).to(self.device),
            img_ids=self.pipeline._prepare_latent_ids(noisy).to(self.device),
            return_dict=False,
        )[0]
        return tokens.mT.unflatten(2, noisy.shape[-2:])

    def training_shift(self, tokens: int) -> float:
        """FLUX.1's line: its makers confirm it for training (OneTrainer, pull request 1516)."""
        line = {"use_dynamic_shifting": True}
        return scheduler_shift(line, tokens)

    def sampling_mu(self, tokens: int, steps: int) -> float:
        """The line of FLUX.2's pipeline, which depends on the number of steps too."""
        return compute_empirical_mu(tokens, steps)
