"""Krea 2 (2026): one stream, text states of twelve layers of Qwen3-VL, Qwen-Image's autoencoder."""

from dataclasses import replace
from typing import Any

from torch import Tensor

from rite_diffusion.backbones.conditioning import MASK
from rite_diffusion.backbones.flow.qwen_image import FilmCodec
from rite_diffusion.backbones.flow.transformer import packed, unpacked
from rite_diffusion.backbones.protocols import Conditioning, Defaults, Guidance, JointAttention

DISTILLED_MU = 1.15  # of the Turbo checkpoint at every size


class Krea2(FilmCodec):
    """Krea 2 Raw, and Turbo for drawing."""

    family = "krea2"
    block_prefixes = ("transformer_blocks.",)
    attention_layers = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.to_gate")
    other_layers = ("ff.gate", "ff.up", "ff.down")
    ends = ("img_in", "final_layer.linear")
    joint_attention = JointAttention(text_first=True, patch=2, text_layers=("text_fusion.",))
    own_defaults = Defaults(steps=28, guidance=5.5)

    def __init__(self, pipeline: Any, *arguments: Any, **options: Any):
        super().__init__(pipeline, *arguments, **options)
        self._is_distilled: bool = pipeline.config.is_distilled
        if self._is_distilled:
            self.guidance = Guidance("none")
            self.defaults = options.get("defaults") or Defaults(steps=8, guidance=1.0)
            self.support = replace(self.support, distilled="train on Krea 2 Raw")

    @property
    def template_tokens(self) -> int:
        """Tokens after the prompt: those before it are not counted."""
        pipeline = self.pipeline
        before = len(self.tokenizer(pipeline.prompt_template_encode_prefix).input_ids)
        counted = before - pipeline.prompt_template_encode_start_idx
        return counted + pipeline.prompt_template_encode_num_suffix_tokens

    def encode(self, prompts: list[str]) -> Conditioning:
        """States (B, tokens, layers width) of a fixed number of tokens, with a mask."""
        states, mask = self.pipeline.encode_prompt(
            prompts, self.device, max_sequence_length=self.tokens
        )
        return Conditioning(states.flatten(2), {MASK: mask})

    def velocity(self, noisy: Tensor, sigma: Tensor, text: Conditioning) -> Tensor:
        """The velocity noise - x_0 (B, C, h, w) at noise levels (B,)."""
        height, width = noisy.shape[-2:]
        states, layers = text.states, self.denoiser_config.num_text_layers
        tokens = self.transformer(
            hidden_states=packed(noisy),
            encoder_hidden_states=states.unflatten(2, (layers, -1)),
            timestep=sigma.to(self.dtype),
            position_ids=self.pipeline.prepare_position_ids(
                states.shape[1], height // 2, width // 2, self.device
            ),
            encoder_attention_mask=text.extra[MASK],
            return_dict=False,
        )[0]
        return unpacked(tokens, height, width)

    def sampling_mu(self, tokens: int, steps: int) -> float:
        """The scheduler's line; a constant for Turbo."""
        return DISTILLED_MU if self._is_distilled else super().sampling_mu(tokens, steps)
