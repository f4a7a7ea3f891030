"""Qwen-Image (2025): text states of Qwen2.5-VL, an autoencoder for films, rescaled guidance."""

from typing import Any

import torch
from torch import Tensor

from rite_diffusion.backbones.conditioning import MASK
from rite_diffusion.backbones.flow.transformer import FlowTransformer, packed, unpacked
from rite_diffusion.backbones.protocols import (
    Conditioning,
    Defaults,
    Guidance,
    classifier_free,
)


def rescaled(uncond: Tensor, cond: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance with each token as long as the conditional prediction's."""
    height, width = cond.shape[-2:]
    guided = packed(classifier_free(uncond, cond, guidance))
    wanted = packed(cond).norm(dim=-1, keepdim=True)
    return unpacked(guided * (wanted / guided.norm(dim=-1, keepdim=True)), height, width)


class FilmCodec(FlowTransformer):
    """A transformer on the latents of Qwen-Image's autoencoder, which sees a film of one frame."""

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        return self.parts.as_it_is("vae").config.z_dim

    @property
    def pixels_per_latent(self) -> int:
        """Pixels along one side of a latent cell."""
        return 2 ** len(self.parts.as_it_is("vae").config.temperal_downsample)

    def _statistics(self) -> tuple[Tensor, Tensor]:
        config, like = self.vae.config, {"device": self.device, "dtype": self.vae.dtype}
        return tuple(
            torch.tensor(each, **like).view(1, -1, 1, 1, 1)
            for each in (config.latents_mean, config.latents_std)
        )  # pyright: ignore[reportReturnType]

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> Tensor:
        """Normalised latents (B, C, h, w), the posterior's mode, of pictures in [-1, 1]."""
        film = pixels.to(self.device, self.vae.dtype).unsqueeze(2)
        mean, deviation = self._statistics()
        return ((self.vae.encode(film).latent_dist.mode() - mean) / deviation).squeeze(2)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] of normalised latents (B, C, h, w)."""
        mean, deviation = self._statistics()
        film = latents.to(self.vae.dtype).unsqueeze(2) * deviation + mean
        return self.vae.decode(film, return_dict=False)[0][:, :, 0]


class QwenImage(FilmCodec):
    """Qwen-Image and its later versions of the same pipeline class."""

    family = "qwen-image"
    block_prefixes = ("transformer_blocks.",)
    attention_layers = (
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
        "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
    )  # fmt: skip
    other_layers = ("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2")
    ends = ("img_in", "proj_out")
    tokens = 1024
    own_defaults = Defaults(steps=50, guidance=4.0)
    guidance = Guidance(combine=rescaled)

    @property
    def template_tokens(self) -> int:
        """Tokens after the prompt: those before it are not counted."""
        pipeline: Any = self.pipeline
        text = pipeline.prompt_template_encode.format("")
        return len(self.tokenizer(text).input_ids) - pipeline.prompt_template_encode_start_idx

    def encode(self, prompts: list[str]) -> Conditioning:
        """The text encoder's last states, the template's beginning left out."""
        states, mask = self.pipeline.encode_prompt(
            prompts, self.device, max_sequence_length=self.tokens
        )
        if mask is None:
            mask = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
        return Conditioning(states, {MASK: mask.bool()})

    def velocity(self, noisy: Tensor, sigma: Tensor, text: Conditioning) -> Tensor:
        """The velocity noise - x_0 (B, C, h, w) at noise levels (B,)."""
        height, width = noisy.shape[-2:]
        tokens = self.transformer(
            hidden_states=packed(noisy),
            timestep=sigma.to(self.dtype),
            encoder_hidden_states=text.states,
            encoder_hidden_states_mask=text.extra[MASK],
            img_shapes=[[(1, height // 2, width // 2)]] * len(noisy),
            return_dict=False,
        )[0]
        return unpacked(tokens, height, width)

    def has_no_effect(self, path: str) -> bool:
        """Whether a layer is the last block's text side, after which text is not looked at."""
        ends = ("add_q_proj", "to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2")
        return path.endswith(ends) and self.is_in_last(path, "transformer_blocks")
