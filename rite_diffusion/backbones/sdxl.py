"""Stable Diffusion XL (Podell et al. 2023): two text encoders, and size conditioning."""

from typing import Any

import torch
from torch import Tensor

from rite_diffusion.backbones.expansion import Chunked
from rite_diffusion.backbones.parts import PartSource
from rite_diffusion.backbones.prompt_syntax import Section, is_blank
from rite_diffusion.backbones.protocols import Conditioning, Defaults
from rite_diffusion.backbones.stable_diffusion import Pipeline, StableDiffusion
from rite_diffusion.config import MemorySection


class StableDiffusionXL(StableDiffusion):
    """An SDXL model behind the Backbone protocol; its weights are frozen."""

    family = "sdxl"
    encoder_names = ("vae", "text_encoder", "text_encoder_2")

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
        self.tokenizer_2 = pipeline.tokenizer_2
        self._empty_is_zero: bool = pipeline.config["force_zeros_for_empty_prompt"]

    @property
    def text_encoder_2(self) -> Any:
        """The second text encoder, a CLIPTextModelWithProjection."""
        return self.parts["text_encoder_2"]

    @property
    def text_fingerprint(self) -> str:
        """An id of both encoders and tokenizers, the dtype, and the handling of empty prompts."""
        return super().text_fingerprint + ("-zeros" if self._empty_is_zero else "")

    @property
    def token_tables(self) -> list[Tensor]:
        """Both encoders' embeddings (tokens, width)."""
        return [*super().token_tables, self.text_encoder_2.get_input_embeddings().weight]

    def _encode(self, prompts: list[list[Section]], chunked: Chunked) -> Conditioning:
        """Both encoders' penultimate hidden states, concatenated, and the second's pooled states.

        States are (B, tokens, width), or (B, layers, tokens, width) with layer-wise embeddings;
        pooled states (B, width) are those of the first chunk, averaged over layers. Both are zero
        for an empty prompt where the model was trained so.
        """
        expansion = self._expanded(prompts, chunked)
        hidden = {"output_hidden_states": True}
        first = expansion.encode(self.text_encoder, 0, **hidden)
        second = expansion.encode(self.text_encoder_2, 1, **hidden)
        each = [first.hidden_states[-2], second.hidden_states[-2]]
        each = [expansion.weighted(states, number) for number, states in enumerate(each)]
        states = expansion.gathered(torch.cat(each, dim=-1))
        pooled = expansion.gathered_pooled(second.text_embeds)  # (B, width)
        if self._empty_is_zero:
            mask = torch.tensor([not is_blank(each) for each in prompts], device=self.device)
            states = states * mask.view(-1, *[1] * (states.ndim - 1))
            pooled = pooled * mask[:, None]
        return Conditioning(states, {"pooled": pooled})

    @property
    def _tokenizers(self) -> list[Any]:
        return [self.tokenizer, self.tokenizer_2]

    def denoise(
        self,
        noisy: Tensor,
        times: Tensor,
        conditioning: Conditioning,
        guidance: float | None = None,
    ) -> Tensor:
        """The UNet's prediction (B, C, h, w) for latents at times (B,).

        Size conditioning: original and target size are the latents' size in pixels, uncropped.
        """
        height, width = (side * self.pixels_per_latent for side in noisy.shape[-2:])
        sizes = torch.tensor([height, width, 0, 0, height, width], device=self.device)
        added = {
            "text_embeds": conditioning.extra["pooled"].to(self.dtype),
            "time_ids": sizes.to(self.dtype).expand(len(noisy), -1),
        }
        return self.unet(
            noisy.to(self.dtype),
            times,
            encoder_hidden_states=conditioning.states.to(self.dtype),
            added_cond_kwargs=added,
        ).sample
