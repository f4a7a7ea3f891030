"""What a base model offers to training, generation and fusion, whatever its family."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor, device, dtype, nn


@dataclass(frozen=True)
class LearnedEmbedding:
    """A word beside those that the model came with; its vectors stand where a prompt says it.

    `rows()` gives per text encoder (layers, vectors, width), layers being 1 or one for each
    cross-attention. It is asked whenever a prompt is encoded, so it may give what is in training.
    """

    adapter: str  # that brought it
    rows: Callable[[], Sequence[Tensor]]


@dataclass(frozen=True)
class Conditioning:
    """What the denoiser is told about a batch of prompts.

    A backbone makes it and takes it; whoever stands between hands it on unread.
    """

    states: Tensor  # (B, tokens, width), or with words of many layers (B, layers, tokens, width)
    extra: dict[str, Tensor] = field(default_factory=dict)  # (B, …) each: pooled embeddings, …


PredictionType = Literal["epsilon", "v_prediction", "flow"]


@dataclass(frozen=True)
class NoiseSchedule:
    """The forward process of a model: x_t = signal x_0 + sigma noise, at T timesteps.

    Later timesteps have more noise.
    """

    signal: Tensor  # (T,)
    sigma: Tensor  # (T,)
    times: Tensor  # (T,) what the model is told
    snr: Tensor  # (T,) (signal / sigma)^2

    def __len__(self) -> int:
        """The number of timesteps T."""
        return len(self.times)

    def to(self, device: device) -> NoiseSchedule:
        """The schedule on a device."""
        tables = (self.signal, self.sigma, self.times, self.snr)
        return NoiseSchedule(*(table.to(device) for table in tables))


class ImageCodec(Protocol):
    """Between pictures and latents."""

    resolution: int  # pixels of the native side
    multiple: int  # picture sides are multiples of this many pixels
    latent_channels: int

    @property
    def pixels_per_latent(self) -> int:
        """Pixels along one side of a latent cell."""
        ...

    def encoder_fingerprint(self) -> str:
        """A name for what makes latents of pictures, the same for equal weights."""
        ...

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Latents (B, C, h, w) of pictures (B, 3, H, W) in [-1, 1]."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1]."""
        ...


class TextConditioner(Protocol):
    """From prompts to what the denoiser is conditioned on."""

    embeddings: dict[str, LearnedEmbedding]  # learned beside the model's own
    triggers: dict[str, Sequence[str]]  # adapter -> words that call it, literal in prompts

    @property
    def token_tables(self) -> list[Tensor]:
        """Each text encoder's embeddings (tokens, width)."""
        ...

    @property
    def text_fingerprint(self) -> str:
        """A name for what makes conditioning of prompts, the same for equal weights."""
        ...

    @property
    def token_budget(self) -> int:
        """Tokens that a caption, or a chunk of a prompt, may have, without begin and end marks."""
        ...

    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        """Conditioning of prompts as users write them: of any length, with weights."""
        ...

    def encode_captions(self, captions: list[str]) -> Conditioning:
        """Conditioning of literal captions, over-long ones cut.

        With gradients to the text encoder's trainable weights.
        """
        ...

    @property
    def protected_words(self) -> Sequence[str]:
        """The words that prompts take literally and whole: learned ones and triggers."""
        ...

    def token_count(self, prompt: str) -> int:
        """Number of the prompt's tokens, begin and end marks excluded."""
        ...

    def encoded_length(self, prompts: list[str]) -> int:
        """Number of tokens in the states that `encode_prompts` returns, found without encoding."""
        ...

    def token_ids(self, text: str) -> list[int]:
        """The tokens of ordinary text, without begin and end marks."""
        ...

    def token_positions(self, prompt: str, word: str) -> list[int]:
        """Where a word's tokens stand in the encoded prompt, at its first mention."""
        ...

    def is_known_word(self, word: str) -> bool:
        """Whether the model came with the word."""
        ...


@dataclass(frozen=True)
class Defaults:
    """How a model draws where a user does not say."""

    steps: int = 25  # denoising steps
    guidance: float = 7.5  # classifier-free guidance scale


class Denoiser(Protocol):
    """The network that predicts, with the noise that it was trained on."""

    prediction_type: PredictionType
    noise_schedule: NoiseSchedule
    defaults: Defaults

    def denoise(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """The prediction (B, C, h, w) for latents at times (B,) of the noise schedule."""
        ...

    def new_scheduler(self) -> Any:
        """A fresh diffusers scheduler for sampling."""
        ...

    def checkpoint_gradients(self, wanted: bool) -> None:
        """Recompute activations in the backward pass instead of keeping them, or keep them."""
        ...

    def compile_denoiser(self, wanted: bool) -> None:
        """Run the denoiser through `torch.compile`, or as it is."""
        ...


class AdapterHost(Protocol):
    """The modules that adapters attach to."""

    name: str
    fingerprint: str
    denoiser_name: str  # which of the components is the denoiser: `unet`, `transformer`

    @property
    def components(self) -> dict[str, nn.Module]:
        """The parts that adapters attach to, by name: the denoiser, `text_encoder`, …."""
        ...

    def lora_targets(self, component: str, blocks: bool = False) -> list[str]:
        """Paths of the attention projections within a component; or of all its blocks' layers."""
        ...


class CrossAttending(Protocol):
    """A model whose text enters by cross-attention alone, as a UNet's does."""

    @property
    def cross_attentions(self) -> Sequence[nn.Module]:
        """The layers that look at the text (diffusers' `Attention`), as a picture passes them."""
        ...


class Backbone(ImageCodec, TextConditioner, Denoiser, AdapterHost, CrossAttending, Protocol):
    """A text-to-image model as training, generation and fusion see it."""

    device: device
    dtype: dtype
    attention: str  # the implementation of attention that is in use

    def release(self, names: Sequence[str]) -> None:
        """Let encoders (`vae`, `text_encoder`, …) leave memory until something needs them."""
        ...

    def recall(self) -> None:
        """Let released encoders be `components` like others."""
        ...
