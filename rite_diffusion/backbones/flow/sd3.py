"""Stable Diffusion 3 and 3.5 (Esser et al. 2024): two CLIPs and T5, pooled text, MMDiT."""

from torch import Tensor

from rite_diffusion.backbones.flow.schedule import TIMES
from rite_diffusion.backbones.flow.transformer import FlowTransformer
from rite_diffusion.backbones.protocols import Conditioning, Defaults

CLIP_TOKENS = 77


class StableDiffusion3(FlowTransformer):
    """Stable Diffusion 3 Medium, 3.5 Medium and 3.5 Large."""

    family = "sd3"
    block_prefixes = ("transformer_blocks.",)
    attention_layers = (
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
        "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
        "attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0",
    )  # fmt: skip
    other_layers = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")
    ends = ("pos_embed.proj", "proj_out")
    encoder_names = ("vae", "text_encoder", "text_encoder_2", "text_encoder_3")
    tokens = 256
    own_defaults = Defaults(steps=28, guidance=7.0)

    @property
    def resolution(self) -> int:
        """Pixels of the native side, which its positions are a table for."""
        return self.denoiser_config.sample_size * self.pixels_per_latent

    @property
    def tokenizer(self):
        """T5's tokenizer; CLIP's where the model was opened without T5."""
        return self.pipeline.tokenizer_3 or self.pipeline.tokenizer

    @property
    def token_budget(self) -> int:
        """Tokens that a prompt may have; CLIP cuts longer ones than its own 75."""
        limit = self.tokens if self.pipeline.text_encoder_3 is not None else CLIP_TOKENS
        return limit - self.template_tokens

    def encode(self, prompts: list[str]) -> Conditioning:
        """CLIP's states of 77 tokens, T5's of 256, and CLIP's pooled ones."""
        states, _, pooled, _ = self.pipeline.encode_prompt(
            prompts,
            None,
            None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.tokens,
        )
        return Conditioning(states, {"pooled": pooled})

    def velocity(self, noisy: Tensor, sigma: Tensor, text: Conditioning) -> Tensor:
        """The velocity noise - x_0 (B, C, h, w) at noise levels (B,)."""
        return self.transformer(
            hidden_states=noisy,
            timestep=TIMES * sigma,
            encoder_hidden_states=text.states,
            pooled_projections=text.extra["pooled"].to(self.dtype),
            return_dict=False,
        )[0]

    def sigmas(self, steps: int) -> list[float] | None:
        """The scheduler's own levels."""
        return None

    def has_no_effect(self, path: str) -> bool:
        """Whether a layer is the last block's query of text, after which text is not looked at."""
        is_last = self.is_in_last(path, "transformer_blocks")
        return path.endswith("add_q_proj") and is_last
