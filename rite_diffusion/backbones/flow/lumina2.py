"""Lumina-Image 2.0 (Qin et al. 2025): one stream, a Gemma 2 text encoder."""

from torch import Tensor

from rite_diffusion.backbones.conditioning import MASK, joined
from rite_diffusion.backbones.flow.transformer import FlowTransformer
from rite_diffusion.backbones.protocols import (
    Conditioning,
    Defaults,
    Guidance,
    JointAttention,
    classifier_free,
)


def rescaled(uncond: Tensor, cond: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance with each row as long as the conditional prediction's."""
    guided = classifier_free(uncond, cond, guidance)
    return guided * (cond.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))


class Lumina2(FlowTransformer):
    """Lumina-Image 2.0: told 1 - sigma, it predicts the negative velocity."""

    family = "lumina2"
    block_prefixes = ("layers.",)
    attention_layers = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")
    other_layers = ("feed_forward.linear_1", "feed_forward.linear_2", "feed_forward.linear_3")
    ends = ("x_embedder", "norm_out.linear_2")
    tokens = 256
    joint_attention = JointAttention(
        text_first=True, patch=2, text_layers=("context_refiner.",), takes_mask=False
    )
    own_defaults = Defaults(steps=30, guidance=4.0)
    guidance = Guidance(combine=rescaled)

    @property
    def template_tokens(self) -> int:
        """Tokens of the system prompt."""
        return len(self.tokenizer(f"{self.pipeline.system_prompt} <Prompt Start> ").input_ids)

    def encode(self, prompts: list[str]) -> Conditioning:
        """The states that enter Gemma's last layer; the empty prompt has no system prompt."""
        parts = []
        for prompt in prompts:
            states, mask, *_ = self.pipeline.encode_prompt(
                prompt,
                False,
                device=self.device,
                system_prompt=None if prompt else "",
                max_sequence_length=self.tokens,
            )
            parts.append(Conditioning(states, {MASK: mask.bool()}))
        return joined(parts)

    def velocity(self, noisy: Tensor, sigma: Tensor, text: Conditioning) -> Tensor:
        """The velocity noise - x_0 (B, C, h, w) at noise levels (B,)."""
        return -self.transformer(
            noisy,
            1 - sigma,
            text.states,
            text.extra[MASK],
            return_dict=False,
        )[0]
