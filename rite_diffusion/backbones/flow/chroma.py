"""Chroma (2025): FLUX.1 schnell's body without CLIP and without guidance distillation."""

import torch
from torch import Tensor

from rite_diffusion.backbones.conditioning import SEEN
from rite_diffusion.backbones.flow.flux import Flux, picture_ids
from rite_diffusion.backbones.flow.transformer import FlowTransformer, packed, unpacked
from rite_diffusion.backbones.protocols import Conditioning, Defaults


class Chroma(FlowTransformer):
    """Chroma: T5's states, of which the first padding token alone is seen beside the prompt's."""

    family = "chroma"
    block_prefixes = Flux.block_prefixes
    attention_layers = Flux.attention_layers
    other_layers = Flux.other_layers
    ends = Flux.ends
    joint_attention = Flux.joint_attention
    own_defaults = Defaults(steps=35, guidance=5.0)

    def encode(self, prompts: list[str]) -> Conditioning:
        """T5's states of a fixed number of tokens, and which of them are seen."""
        states, _, mask, *_ = self.pipeline.encode_prompt(
            prompts,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.tokens,
        )
        return Conditioning(states, {SEEN: mask.bool()})

    def velocity(self, noisy: Tensor, sigma: Tensor, text: Conditioning) -> Tensor:
        """The velocity noise - x_0 (B, C, h, w) at noise levels (B,)."""
        height, width = noisy.shape[-2:]
        latents, seen = packed(noisy), text.extra[SEEN].bool()
        picture = torch.ones(latents.shape[:2], dtype=torch.bool, device=self.device)
        tokens = self.transformer(
            latents,
            encoder_hidden_states=text.states,
            timestep=sigma.to(self.dtype),
            img_ids=picture_ids(height // 2, width // 2, self.device),
            txt_ids=torch.zeros(text.states.shape[1], 3, device=self.device),
            attention_mask=torch.cat([seen, picture], 1),
            return_dict=False,
        )[0]
        return unpacked(tokens, height, width)
