"""FLUX.1 (Black Forest Labs 2024): CLIP's pooled text, T5's states, an embedded guidance scale."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rite_diffusion.backbones.flow.transformer import GUIDANCE, FlowTransformer, packed, unpacked
from rite_diffusion.backbones.protocols import Conditioning, Defaults, Guidance, JointAttention

TEXT_LAYERS = ("add_", "ff_context")  # in the paths of layers that see text tokens alone


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
    joint_attention = JointAttention(text_first=True, patch=2, text_layers=TEXT_LAYERS)
    own_defaults = Defaults(steps=28, guidance=3.5)

    def __init__(self, pipeline: Any, *arguments: Any, **options: Any):
        super().__init__(pipeline, *arguments, **options)
        if self.denoiser_config.guidance_embeds:
            self.guidance = Guidance("embedded")
        else:
            self.guidance = Guidance("none")
            self.tokens = 256  # pyright: ignore[reportAttributeAccessIssue]
            self.support = replace(self.support, distilled="train on FLUX.1-dev")

    def encode(self, prompts: list[str]) -> Conditioning:
        """T5's states of a fixed number of tokens, and CLIP's pooled ones."""
        states, pooled, _ = self.pipeline.encode_prompt(
            prompts, None, self.device, max_sequence_length=self.tokens
        )
        return Conditioning(states, {"pooled": pooled})

    def velocity(self, noisy: Tensor, sigma: Tensor, text: Conditioning) -> Tensor:
        """The velocity noise - x_0 (B, C, h, w) at noise levels (B,)."""
        height, width = noisy.shape[-2:]
        tokens = self.transformer(
            packed(noisy),
            encoder_hidden_states=text.states,
            pooled_projections=text.extra["pooled"].to(self.dtype),
            timestep=sigma.to(self.dtype),
            guidance=text.extra.get(GUIDANCE),
            img_ids=picture_ids(height // 2, width // 2, self.device),
            txt_ids=torch.zeros(text.states.shape[1], 3, device=self.device),
            return_dict=False,
        )[0]
        return unpacked(tokens, height, width)
