"""FLUX.1 (Black Forest Labs 2024): CLIP's pooled text, T5's states, an embedded guidance scale."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rite_diffusion.backbones.flow.schedule import TIMES
from rite_diffusion.backbones.flow.transformer import FlowTransformer, packed, unpacked
from rite_diffusion.backbones.protocols import Conditioning, Defaults, Guidance

TRAINING_GUIDANCE = 1.0  # what the model is told while a LoRA trains


def picture_ids(height: int, width: int, device: torch.device) -> Tensor:
    """Positions (height width, 3) of tokens: 0, row, column."""
    rows, columns = torch.arange(height), torch.arange(width)
    zero = torch.zeros(1, dtype=torch.long)
    return torch.cartesian_prod(zero, rows, columns).to(device)


class Flux(FlowTransformer):
    """FLUX.1 dev, Kontext's text-to-image, and schnell."""

    family = "flux"
    block_prefixes = ("transformer_blocks.", "single_transformer_blocks.")
    attention_layers = (
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
        "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
    )  # fmt: skip
    other_layers = (
        "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2",
        "proj_mlp", "proj_out",
    )  # fmt: skip
    ends = ("x_embedder", "proj_out")
    encoder_names = ("vae", "text_encoder", "text_encoder_2")
    tokenizer_name = "tokenizer_2"
    own_defaults = Defaults(steps=28, guidance=3.5)

    def __init__(self, pipeline: Any, *arguments: Any, **options: Any):
        super().__init__(pipeline, *arguments, **options)
        self._is_told_guidance: bool = self.transformer.config.guidance_embeds
        self.guidance = Guidance("embedded" if self._is_told_guidance else "none")
        if not self._is_told_guidance:
            self.tokens = 256  # pyright: ignore[reportAttributeAccessIssue]
            self.support = replace(self.support, distilled="train on FLUX.1-dev")

    def encode(self, prompts: list[str]) -> Conditioning:
        """T5's states of a fixed number of tokens, and CLIP's pooled ones."""
        states, pooled, _ = self.pipeline.encode_prompt(
            prompts, None, self.device, max_sequence_length=self.tokens
        )
        return Conditioning(states, {"pooled": pooled})

    def denoise(
        self,
        noisy: Tensor,
        times: Tensor,
        conditioning: Conditioning,
        guidance: float | None = None,
    ) -> Tensor:
        """The velocity noise - x_0 (B, C, h, w) at times (B,) in [0, 1000]."""
        height, width = noisy.shape[-2:]
        scale = TRAINING_GUIDANCE if guidance is None else guidance
        told = torch.full((len(noisy),), scale, device=self.device)
        tokens = self.transformer(
            packed(noisy.to(self.dtype)),
            encoder_hidden_states=conditioning.states.to(self.dtype),
            pooled_projections=conditioning.extra["pooled"].to(self.dtype),
            timestep=(times / TIMES).to(self.dtype),
            guidance=told if self._is_told_guidance else None,
            img_ids=picture_ids(height // 2, width // 2, self.device),
            txt_ids=torch.zeros(conditioning.states.shape[1], 3, device=self.device),
            return_dict=False,
        )[0]
        return unpacked(tokens, height, width)
