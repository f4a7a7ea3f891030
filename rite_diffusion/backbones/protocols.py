"""The interface of a base model for training, generation and fusion, whatever its family."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor, device, dtype, nn

    from rite_diffusion.config import MemorySection


@dataclass(frozen=True)
class LearnedEmbedding:
    """A learned embedding, whose vectors replace its word in prompts.

    `rows()` returns (layers, vectors, width) for each text encoder, where layers is 1 or the number
    of cross-attentions. It is called at every encoding and may return tensors that are being
    trained, so that gradients reach them.
    """

    adapter: str  # name of the adapter that it belongs to
    rows: Callable[[], Sequence[Tensor]]


@dataclass(frozen=True)
class Conditioning:
    """The denoiser's text input for a batch of prompts, made by a backbone's `encode_prompts`."""

    states: Tensor  # (B, tokens, width); with layer-wise embeddings (B, layers, tokens, width)
    extra: dict[str, Tensor] = field(default_factory=dict)  # (B, …) each: pooled states, …


PredictionType = Literal["epsilon", "v_prediction", "flow"]


@dataclass(frozen=True)
class Levels:
    """Noise levels of a batch: x_t = signal x_0 + sigma noise."""

    signal: Tensor  # (B,)
    sigma: Tensor  # (B,)
    times: Tensor  # (B,) the denoiser's time input
    snr: Tensor  # (B,) (signal / sigma)^2


class NoiseSchedule(Protocol):
    """The forward process of a model, from clean latents at place 0 to noise at place 1."""

    def levels(self, places: Tensor, cells: tuple[int, int], shift: float | None = None) -> Levels:
        """The noise levels at places (B,) in [0, 1), for latents of `cells` (height, width).

        `shift` replaces a flow's own shift towards noise; ConfigError for schedules without one.
        """
        ...


def classifier_free(uncond: Tensor, cond: Tensor, guidance: float) -> Tensor:
    """The guided prediction: uncond + w (cond - uncond) (Ho & Salimans 2022)."""
    return uncond + guidance * (cond - uncond)


@dataclass(frozen=True)
class Guidance:
    """How a guidance scale acts on a model.

    `classifier_free`: `combine` joins the predictions for the negative prompt and the prompt.
    `embedded`: the scale is an input of the model. `none`: a distilled model without a scale.
    """

    kind: Literal["classifier_free", "embedded", "none"] = "classifier_free"
    combine: Callable[[Tensor, Tensor, float], Tensor] = classifier_free


class ImageCodec(Protocol):
    """Conversion between pictures and latents."""

    resolution: int  # pixels of the native side
    multiple: int  # picture sides are multiples of this many pixels
    latent_channels: int

    @property
    def pixels_per_latent(self) -> int:
        """Pixels along one side of a latent cell."""
        ...

    def encoder_fingerprint(self) -> str:
        """An id of the encoder from pictures to latents, the same for equal weights."""
        ...

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Latents (B, C, h, w) of pictures (B, 3, H, W) in [-1, 1]."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] of latents (B, C, h, w)."""
        ...


class TextConditioner(Protocol):
    """Conversion of prompts to the denoiser's conditioning."""

    embeddings: dict[str, LearnedEmbedding]  # word -> learned embedding
    triggers: dict[str, Sequence[str]]  # adapter's name -> its trigger words

    @property
    def token_tables(self) -> list[Tensor]:
        """Each text encoder's embeddings (tokens, width)."""
        ...

    @property
    def text_fingerprint(self) -> str:
        """An id of text encoders and tokenizers, the same for equal weights."""
        ...

    @property
    def token_budget(self) -> int:
        """Most tokens of a caption or of a prompt's chunk, without begin and end marks."""
        ...

    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        """Conditioning of prompts as users write them: of any length, with prompt syntax."""
        ...

    def encode_captions(self, captions: list[str]) -> Conditioning:
        """Conditioning of captions, without prompt syntax; tokens beyond the budget are cut off.

        Gradients reach the text encoder's trainable weights.
        """
        ...

    @property
    def protected_words(self) -> Sequence[str]:
        """Words that prompts keep whole and without syntax: learned embeddings and triggers."""
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
        """Positions of a word's tokens in the encoded prompt, at its first mention."""
        ...

    def is_known_word(self, word: str) -> bool:
        """Whether the tokenizer has the word as a single token."""
        ...


@dataclass(frozen=True)
class Defaults:
    """Sampling settings for a model where the user does not choose."""

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
    """The network that predicts, and the noise schedule that it was trained with."""

    prediction_type: PredictionType
    guidance: Guidance
    defaults: Defaults

    @property
    def noise_schedule(self) -> NoiseSchedule:
        """The forward process that the network was trained with."""
        ...

    def denoise(
        self,
        noisy: Tensor,
        times: Tensor,
        conditioning: Conditioning,
        guidance: float | None = None,
    ) -> Tensor:
        """The prediction (B, C, h, w) for latents at times (B,) of the noise schedule.

        `guidance` is the scale for models with embedded guidance, by default that of training.
        """
        ...

    def sampler(self, steps: int, cells: tuple[int, int]) -> Any:
        """A new diffusers scheduler set to `steps`, for latents of `cells` (height, width)."""
        ...

    def checkpoint_gradients(self, wanted: bool) -> None:
        """Turn gradient checkpointing on or off: less memory, slower backward pass."""
        ...

    def compile_denoiser(self, wanted: bool) -> None:
        """Turn `torch.compile` of the denoiser on or off."""
        ...


class AdapterHost(Protocol):
    """The modules that adapters attach to."""

    name: str
    fingerprint: str
    denoiser_name: str  # which of the components is the denoiser: `unet`, `transformer`
    family: str  # whose layers it has: `sd`, `sdxl`, `z-image`, ...
    support: Support

    @property
    def components(self) -> dict[str, nn.Module]:
        """The modules that adapters attach to, by name: the denoiser, `text_encoder`, …."""
        ...

    @property
    def architecture(self) -> dict[str, nn.Module]:
        """The modules of `components` for names and shapes: parts not loaded have no weights."""
        ...

    def lora_targets(self, component: str, blocks: bool = False) -> list[str]:
        """Paths of a component's attention projections, or with `blocks` of all blocks' layers."""
        ...


@dataclass(frozen=True)
class JointAttention:
    """The order of the tokens of text and picture in a transformer's joint attentions."""

    text_first: bool
    patch: int  # latent cells along the side of a picture token
    multiple: int = 1  # text and picture are each padded to a multiple of so many tokens
    text_layers: tuple[str, ...] = ()  # in the paths of modules that see text tokens alone
    takes_mask: bool = True  # whether its attentions can be told who sees whom

    def picture_tokens(self, rows: int, columns: int) -> int:
        """Number of picture tokens, padding included, of latents of so many cells."""
        cells = (rows // self.patch) * (columns // self.patch)
        return -(-cells // self.multiple) * self.multiple

    def is_text(self, path: str) -> bool:
        """Whether the module at a path within the denoiser sees text tokens alone."""
        return any(part in path for part in self.text_layers)


class Attending(Protocol):
    """How text reaches the picture: by cross-attention, as in a UNet, or by joint attention."""

    joint_attention: JointAttention | None

    @property
    def cross_attentions(self) -> Sequence[nn.Module]:
        """The cross-attentions (diffusers' `Attention`) in the order of the forward pass."""
        ...


class Backbone(ImageCodec, TextConditioner, Denoiser, AdapterHost, Attending, Protocol):
    """A text-to-image model as training, generation and fusion see it."""

    device: device
    dtype: dtype
    attention: str  # the implementation of attention in use
    memory: MemorySection  # how its weights are stored, and where

    @property
    def text_encoders(self) -> Sequence[str]:
        """The names of the text encoders: `text_encoder`, …."""
        ...

    def load(self) -> None:
        """Load all parts, which are otherwise loaded when they are used."""
        ...

    def release(self, names: Sequence[str]) -> None:
        """Move parts (`vae`, `text_encoder`, …) off the device until they are used again."""
        ...

    def unload(self, names: Sequence[str]) -> None:
        """Drop parts from all memory; they are read from the base's files when they are used."""
        ...

    def recall(self) -> None:
        """Load released parts again as soon as `components` is used."""
        ...
