"""The words that every part of the toolkit shares: errors, concepts, LoRA pairs, the backbone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from PIL.Image import Image
    from torch import Tensor, device, dtype, nn


class RiteError(Exception):
    """A fault that the user can mend; the message says what was found and what to do."""


class ConfigError(RiteError):
    """A setting is unknown or out of range."""


class PhotoFolderError(RiteError):
    """The photo folder cannot be trained on."""


class BackboneError(RiteError):
    """The base model cannot be found or opened."""


class AdapterError(RiteError):
    """An adapter file is damaged, foreign, or made for another base model."""


class FusionError(RiteError):
    """Adapters cannot be fused with each other or in the wanted way."""


class OptimizerError(RiteError, ValueError):
    """An optimizer's setting is out of range, or parameters or gradients do not suit it."""


class RunError(RiteError):
    """The run folder cannot be used."""


class StudioError(RiteError):
    """The studio was asked for something that it refuses."""


@dataclass(frozen=True)
class Concept:
    """What is learned: the word that calls it and the kind of thing it is."""

    trigger: str
    class_noun: str


@dataclass(frozen=True)
class Photo:
    """One training picture with its caption. Its pixels stay in its file until they are needed."""

    path: Path
    size: tuple[int, int]  # width, height
    caption: str
    open: Callable[[], tuple[Image, Image | None]] = field(compare=False)  # picture and mask
    digest: str  # of the pixels
    likeness: int  # 64 bits, most of which near-duplicates share
    mask_digest: str = ""  # of the mask; empty: there is none
    white: float | None = None  # share of the mask that is white; None: there is no mask
    repeats: int = 1  # how often an epoch shows it
    weight: float = 1.0  # of its loss

    @property
    def image(self) -> Image:
        """The picture (RGB, upright), read from its file."""
        return self.open()[0]

    @property
    def mask(self) -> Image | None:
        """The mask (of the picture's size, mode L; white is learned), read from its file."""
        return self.open()[1]


@dataclass(frozen=True)
class LoraPair:
    """The factors of one adapted layer: delta W = scale * up @ down.

    `down` is (rank, in) or (rank, in, k, k), `up` is (out, rank) or (out, rank, 1, 1). With a
    `magnitude` m (out,) the layer is a DoRA (Liu et al. 2024, Eq. 5): its adapted weight is
    m * (W + delta W) / |W + delta W|, norms taken over each output's weights.
    """

    name: str  # the module's name in adapter files: "lora_unet_mid_block_attentions_0_…_to_q"
    down: Tensor
    up: Tensor
    scale: float
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        """Number of rows of `down`."""
        return self.down.shape[0]


@dataclass(frozen=True)
class Shift:
    """What an adapter adds to a vector of a module, at its weight: a bias, or a norm's weight."""

    name: str  # the module's, as a pair's
    parameter: Literal["weight", "bias"]
    values: Tensor  # (out,)


@dataclass(frozen=True)
class Word:
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

    def rows(self, places: list[int]) -> Conditioning:
        """That of the prompts at these places, which may repeat."""
        extra = {name: values[places] for name, values in self.extra.items()}
        return Conditioning(self.states[places], extra)


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


class Backbone(Protocol):
    """A text-to-image model as the trainer and the generator see it."""

    name: str
    fingerprint: str
    resolution: int  # pixels of the native side
    multiple: int  # picture sides are multiples of this many pixels
    latent_channels: int
    prediction_type: PredictionType
    noise_schedule: NoiseSchedule
    device: device
    dtype: dtype
    words: dict[str, Word]  # learned beside the model's own

    @property
    def cross_attentions(self) -> Sequence[nn.Module]:
        """The layers that look at the text (diffusers' `Attention`), as a picture passes them."""
        ...

    @property
    def token_tables(self) -> list[Tensor]:
        """Each text encoder's embeddings (tokens, width)."""
        ...

    def encoder_fingerprint(self) -> str:
        """A name for what makes latents of pictures, the same for equal weights."""
        ...

    @property
    def text_fingerprint(self) -> str:
        """A name for what makes conditioning of prompts, the same for equal weights."""
        ...

    def release(self, names: Sequence[str]) -> None:
        """Let encoders (`vae`, `text_encoder`, …) leave memory until something needs them."""
        ...

    def recall(self) -> None:
        """Let released encoders be `components` like others."""
        ...

    @property
    def components(self) -> dict[str, nn.Module]:
        """The parts that adapters attach to, by name: `unet`, `text_encoder`, …."""
        ...

    def lora_targets(self, component: str, blocks: bool = False) -> list[str]:
        """Paths of the attention projections within a component; or of all its blocks' layers."""
        ...

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Latents (B, C, h, w) of pictures (B, 3, H, W) in [-1, 1]."""
        ...

    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        """Conditioning of prompts, with gradients to the text encoder's trainable weights."""
        ...

    def denoise(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """The prediction (B, C, h, w) for latents at times (B,) of the noise schedule."""
        ...

    def checkpoint_gradients(self, wanted: bool) -> None:
        """Recompute activations in the backward pass instead of keeping them, or keep them."""
        ...

    def compile_denoiser(self, wanted: bool) -> None:
        """Run the denoiser through `torch.compile`, or as it is."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1]."""
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

    @property
    def token_budget(self) -> int:
        """How many tokens a prompt may have, begin and end marks excluded."""
        ...

    @property
    def pixels_per_latent(self) -> int:
        """Pixels along one side of a latent cell."""
        ...

    def new_scheduler(self) -> Any:
        """A fresh diffusers scheduler for sampling."""
        ...
