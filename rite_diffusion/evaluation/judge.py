"""The judge: a small network that recognises objects and concepts in 64x64 pictures.

It was trained by `train/judge.py` on other scenes and distortions than the pocket base, and nothing
is trained against it. It has three outputs, from one feature map:

    nouns     which of 64 nouns the picture shows, or its left and its right half
    colours   which of 10 colours its background has
    embed     a unit vector per picture, close for the same object and distant for others, also for
              objects that it was not trained on: a measure of a concept's identity
"""

import json
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

SIZE = 64  # pixels of the side at which pictures are judged
EMBEDDING = 64  # numbers in a picture's embedding
BATCH = 256  # pictures judged at once


# --- the network -------------------------------------------------------------------------------


class Convolution(nn.Sequential):
    """3x3 convolution, batch norm, ReLU."""

    def __init__(self, channels_in: int, channels_out: int, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(channels_out),
            nn.ReLU(),
        )


class Residual(nn.Module):
    """Two convolutions added to their input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = Convolution(channels, channels)
        self.second = Convolution(channels, channels)

    def forward(self, features: Tensor) -> Tensor:
        """Features of the same shape."""
        return features + self.second(self.first(features))


class JudgeNetwork(nn.Module):
    """Convolutions to an 8x8 feature map, and three linear heads on its pooled features."""

    def __init__(self, nouns: int, colours: int, channels: tuple[int, int, int] = (24, 48, 128)):
        super().__init__()
        fine, middle, coarse = channels
        self.features = nn.Sequential(  # (n, 3, 64, 64) in [-1, 1] to (n, C, 8, 8)
            Convolution(3, fine, stride=2),
            Convolution(fine, middle, stride=2),
            Residual(middle),
            Convolution(middle, coarse, stride=2),
            Residual(coarse),
            Residual(coarse),
        )
        self.noun = nn.Linear(2 * coarse, nouns)
        self.colour = nn.Linear(2 * coarse, colours)
        self.identity = nn.Linear(2 * coarse, EMBEDDING)

    def pooled(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features (n, C, 8, 8) pooled to (n, 2C) over the whole, the left and the right half."""
        left, right = features.chunk(2, dim=-1)
        return pool(features), pool(left), pool(right)

    def embedding(self, pooled: Tensor) -> Tensor:
        """Unit vectors (n, 64)."""
        return F.normalize(self.identity(pooled), dim=-1)


def pool(features: Tensor) -> Tensor:
    """Mean and maximum of each channel, (n, C, h, w) to (n, 2C)."""
    return torch.cat([features.mean((-2, -1)), features.amax((-2, -1))], dim=-1)


def as_pixels(images: list[Image.Image]) -> Tensor:
    """Pictures of any size and mode as (n, 3, 64, 64) in [-1, 1]."""
    small = [
        image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS) for image in images
    ]
    stacked = torch.from_numpy(np.stack([np.asarray(image) for image in small]))
    return stacked.permute(0, 3, 1, 2).float() / 127.5 - 1


# --- the frozen judge --------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Judge:
    """A trained network with the names of its classes.

    `prototypes` holds one unit vector per noun and style; `accuracy` the judge's own accuracy on
    unseen scenes, to be quoted beside its figures.
    """

    network: JudgeNetwork
    noun_names: tuple[str, ...]
    colour_names: tuple[str, ...]
    prototypes: Tensor  # (p, 64)
    prototype_names: tuple[str, ...]
    threshold: float  # least similarity at which a picture shows a concept
    accuracy: dict

    @torch.no_grad()
    def _pooled(self, images: list[Image.Image]) -> tuple[Tensor, Tensor, Tensor]:
        batches = as_pixels(images).split(BATCH)
        features = torch.cat([self.network.features(batch) for batch in batches])
        return self.network.pooled(features)

    def _named_nouns(self, pooled: Tensor) -> list[str]:
        return [self.noun_names[i] for i in self.network.noun(pooled).argmax(-1)]

    def nouns(self, images: list[Image.Image]) -> list[str]:
        """The noun of each picture, for pictures of one object."""
        return self._named_nouns(self._pooled(images)[0])

    def pairs(self, images: list[Image.Image]) -> list[tuple[str, str]]:
        """The nouns in the left and the right half of each picture."""
        _, left, right = self._pooled(images)
        return list(zip(self._named_nouns(left), self._named_nouns(right), strict=True))

    def colours(self, images: list[Image.Image]) -> list[str]:
        """The background colour of each picture."""
        whole, _, _ = self._pooled(images)
        return [self.colour_names[i] for i in self.network.colour(whole).argmax(-1)]

    def embed(self, images: list[Image.Image]) -> Tensor:
        """Unit vectors (n, 64), one per picture."""
        whole, _, _ = self._pooled(images)
        return self.network.embedding(whole).detach()

    def prototype(self, photos: list[Image.Image]) -> Tensor:
        """Unit vector (64,): the direction of the photos' mean embedding."""
        return F.normalize(self.embed(photos).mean(0), dim=0)

    def identity(self, photos: list[Image.Image], pictures: list[Image.Image]) -> float:
        """Mean cosine in [-1, 1] between the pictures' embeddings and the photos' prototype."""
        return (self.embed(pictures) @ self.prototype(photos)).mean().item()

    def concept_scores(self, prototype: Tensor, embeddings: Tensor) -> Tensor:
        """Cosines (n,) of embeddings (n, 64) to a prototype (64,); -1 where a noun is nearer."""
        similarity = embeddings @ prototype
        nearest_noun = (embeddings @ self.prototypes.T).amax(-1)
        return similarity.where(similarity > nearest_noun, -1.0)

    def recognised(self, photos: list[Image.Image], pictures: list[Image.Image]) -> list[bool]:
        """Whether each picture shows the photos' concept.

        That is where its embedding is nearer to the photos' prototype than to any noun's, and
        their similarity is above the threshold.
        """
        scores = self.concept_scores(self.prototype(photos), self.embed(pictures))
        return (scores > self.threshold).tolist()


# --- on disk -----------------------------------------------------------------------------------


def save_judge(judge: Judge, path: Path) -> None:
    """Write a judge as half-precision safetensors, with names and figures in the header."""
    state = judge.network.state_dict() | {"prototypes": judge.prototypes}
    halves = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    header = {
        "nouns": judge.noun_names,
        "colours": judge.colour_names,
        "prototype_names": judge.prototype_names,
        "threshold": judge.threshold,
        "accuracy": judge.accuracy,
    }
    tensors = {key: value.contiguous() for key, value in halves.items()}
    save_file(tensors, path, {key: json.dumps(value) for key, value in header.items()})


def read_judge(path: Path) -> Judge:
    """The judge in a file that `save_judge` wrote, frozen, in single precision."""
    with safe_open(path, "pt") as file:
        header = {key: json.loads(value) for key, value in file.metadata().items()}
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    prototypes = F.normalize(tensors.pop("prototypes").float(), dim=-1)
    network = JudgeNetwork(len(header["nouns"]), len(header["colours"]))
    network.load_state_dict(tensors)
    return Judge(
        network.eval().requires_grad_(False),
        tuple(header["nouns"]),
        tuple(header["colours"]),
        prototypes,
        tuple(header["prototype_names"]),
        header["threshold"],
        header["accuracy"],
    )


@cache
def load_judge() -> Judge:
    """The judge in the package."""
    with resources.as_file(
        resources.files("rite_diffusion.evaluation") / "judge.safetensors"
    ) as path:
        return read_judge(path)
