"""Z-Image (Tongyi-MAI 2025): one stream of text and picture, a Qwen3 text encoder."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rite_diffusion.backbones.conditioning import own_states, padded
from rite_diffusion.backbones.flow.transformer import FlowTransformer, chat_tokens
from rite_diffusion.backbones.protocols import Conditioning, Defaults, Guidance, JointAttention


class ZImage(FlowTransformer):
    """Z-Image: its transformer is told 1 - sigma and predicts the negative velocity."""

    family = "z-image"
    block_prefixes = ("layers.",)
    attention_layers = ("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0")
    other_layers = ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
    ends = ("all_x_embedder.2-1", "all_final_layer.2-1.linear")
    joint_attention = JointAttention(
        text_first=False, patch=2, multiple=32, text_layers=("context_refiner.",)
    )
    own_defaults = Defaults(steps=50, guidance=5.0)

    def __init__(self, pipeline: Any, name: str, *arguments: Any, **options: Any):
        super().__init__(pipeline, name, *arguments, **options)
        if "turbo" in name.lower():  # nothing in the model's own files tells
            self.guidance = Guidance("none")
            self.defaults = Defaults(steps=9, guidance=1.0)
            self.support = replace(self.support, distilled="train on Z-Image")

    @property
    def template_tokens(self) -> int:
        """Tokens of the chat template around a prompt."""
        return chat_tokens(self.tokenizer, enable_thinking=True)

    def encode(self, prompts: list[str]) -> Conditioning:
        """The states that enter the text encoder's last layer, padding removed."""
        states, _ = self.pipeline.encode_prompt(
            prompts, self.device, False, max_sequence_length=self.tokens
        )
        return padded(states)

    def velocity(self, noisy: Tensor, sigma: Tensor, text: Conditioning) -> Tensor:
        """The velocity noise - x_0 (B, C, h, w) at noise levels (B,)."""
        pictures = list(noisy.unsqueeze(2).unbind(0))
        output = self.transformer(pictures, 1 - sigma, own_states(text), return_dict=False)[0]
        return -torch.stack(list(output)).squeeze(2)
