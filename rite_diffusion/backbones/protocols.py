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
class Levels:
    """Noise levels of a batch: x_t = signal x_0 + sigma noise."""

    signal: Tensor  # (B,)
    sigma: Tensor  # (B,)
    times: Tensor  # (B,) what the model is told
    snr: Tensor  # (B,) (signal / sigma)^2


class NoiseSchedule(Protocol):
    """The forward process of a model, from clean pictures at place 0 to noise at place 1."""

    def levels(self, places: Tensor, cells: tuple[int, int], shift: float | None = None) -> Levels:
        """The noise levels at places (B,) in [0, 1), for latents of `cells` (height, width).

        `shift` replaces a flow's own shift towards noise; ConfigError where there is none.
        """
        ...


def classifier_free(uncond: Tensor, cond: Tensor, guidance: float) -> Tensor:
    """Uncond + w (cond - uncond) (Ho & Salimans 2022)."""
    return uncond + guidance * (cond - uncond)


@dataclass(frozen=True)
class Guidance:
    """How a guidance scale acts on a model.

    `classifier_free` takes a second prediction, of the negative prompt, and `combine` joins the
    two. `embedded`: the model is told the scale. `none`: a distilled model has one built in.
    """

    kind: Literal["classifier_free", "embedded", "none"] = "classifier_free"
    combine: Callable[[Tensor, Tensor, float], Tensor] = classifier_free


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
    def literal_words(self) -> Sequence[str]:
        """The words that prompts take literally and whole: learned ones and triggers."""
        ...

    def token_count(self, prompt: str) -> int:
        """Number of the prompt's tokens, begin and end marks excluded."""
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


@dataclass(frozen=True)
class Support:
    """What can be trained on a model.

    `distilled` says what to train on instead of a few-step model; empty where that is this one.
    """

    methods: frozenset[str] | None = None  # None: all
    text_encoder: bool = True  # whether text encoders can be adapted
    distilled: str = ""


class Denoiser(Protocol):
    """The network that predicts, with the noise that it was trained on."""

    prediction_type: PredictionType
    guidance: Guidance
    defaults: Defaults

    @property
    def noise_schedule(self) -> NoiseSchedule:
        """The forward process that the network was trained on."""
        ...

    def denoise(
        self,
        noisy: Tensor,
        times: Tensor,
        conditioning: Conditioning,
        guidance: float | None = None,
    ) -> Tensor:
        """The prediction (B, C, h, w) for latents at times (B,) of the noise schedule.

        `guidance` is for models with an embedded one, and defaults to that of training.
        """
        ...

    def sampler(self, steps: int, cells: tuple[int, int]) -> Any:
        """A fresh diffusers scheduler, set to so many steps for latents of (height, width)."""
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
    support: Support

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
