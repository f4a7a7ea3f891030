"""The judge: a small network that recognises objects and concepts in small pictures.

It was trained by `train/judge.py` on other scenes and distortions than the pocket base, and nothing
is trained against it. It has three outputs:

    nouns     which noun the picture shows, or its left and its right half; "" for none
    colours   which colour its background has
    embed     a unit vector per picture, close for the same object and distant for others, also for
              objects that it was not trained on: a measure of a concept's identity

A judge's file says at which side pictures are judged and how wide its network is.
"""

import json
from dataclasses import asdict, dataclass
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

BATCH = 256  # pictures judged at once
WHOLE, LEFT, RIGHT = range(3)  # parts of a picture
FAINT = 0.3  # a mask's values below this count as background
REACH = 2.4  # half side of an enlarged picture, in standard deviations of the object's mask


# --- the network -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """The sizes of a judge's network; by default those of the judge of 64 pixels."""

    side: int = 64  # pixels at which pictures are judged
    stages: tuple[tuple[int, int], ...] = ((24, 0), (48, 1), (128, 2))  # channels, residual blocks
    embedding: int = 64  # numbers in a picture's embedding
    cells: int = 0  # a side, of the grid on the object; 0: embeddings are of whole pictures
    cell_channels: int = 12  # features in each cell


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
    """Stages that halve the picture's side, and three linear heads.

    Nouns and colours are read from the last stage's pooled features (2C). Where the shape has
    cells, embeddings are of the object alone: a mask on the features ahead of the last two stages
    says where it is, the picture is enlarged around it and passes all stages. So neither the
    object's place nor its size matters, but what its parts are and where they are.
    `nouns` counts the answers of the noun head: the nouns, and one more where "none" is an answer.
    """

    def __init__(self, nouns: int, colours: int, shape: Shape = Shape()) -> None:  # noqa: B008
        super().__init__()
        layers, starts, before = [], [], 3
        for channels, blocks in shape.stages:
            starts.append(len(layers))
            layers.append(Convolution(before, channels, stride=2))
            layers += [Residual(channels) for _ in range(blocks)]
            before = channels
        self.features = nn.Sequential(*layers)
        self.starts, self.cells = starts[-2:], shape.cells  # of the last two stages
        self.noun = nn.Linear(2 * before, nouns)
        self.colour = nn.Linear(2 * before, colours)
        vector = 2 * before + shape.cells**2 * shape.cell_channels
        self.identity = nn.Linear(vector, shape.embedding)
        if shape.cells:
            self.mask = nn.Conv2d(shape.stages[-3][0], 1, 5, padding=2)
            self.cell = nn.Conv2d(shape.stages[-2][0], shape.cell_channels, 1)

    def fine(self, pixels: Tensor) -> Tensor:
        """Features ahead of the last two stages of pixels (n, 3, side, side) in [-1, 1]."""
        return self.features[: self.starts[0]](pixels)

    def deep(self, fine: Tensor) -> tuple[Tensor, Tensor]:
        """What the last two stages make of features: (n, c, 2h, 2h) and (n, C, h, h)."""
        middle = self.features[self.starts[0] : self.starts[1]](fine)
        return middle, self.features[self.starts[1] :](middle)

    def pools(self, coarse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The last features (n, C, h, h) pooled over the whole, the left and the right half."""
        left, right = coarse.chunk(2, dim=-1)
        return pool(coarse), pool(left), pool(right)

    def masks(self, fine: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Where the object is, in [0, 1]: in the whole picture, its left and its right half."""
        mask = self.mask(fine).sigmoid()
        is_left = torch.arange(mask.shape[-1], device=mask.device) < mask.shape[-1] // 2
        return mask, mask * is_left, mask * ~is_left

    def embedding(self, middle: Tensor, coarse: Tensor) -> Tensor:
        """Unit vectors (n, e) of what `deep` makes of enlarged objects."""
        cells = F.adaptive_avg_pool2d(F.relu(self.cell(middle)), self.cells).flatten(1)
        return F.normalize(self.identity(torch.cat([pool(coarse), cells], dim=-1)), dim=-1)

    def embeddings(self, pixels: Tensor, part: int = WHOLE) -> Tensor:
        """Unit vectors (n, e) of whole pictures, of their LEFT or of their RIGHT halves."""
        fine = self.fine(pixels)
        if not self.cells:
            return F.normalize(self.identity(self.pools(self.deep(fine)[1])[part]), dim=-1)
        enlarged = on_object(pixels, self.masks(fine)[part])
        return self.embedding(*self.deep(self.fine(enlarged)))


def on_object(pixels: Tensor, mask: Tensor) -> Tensor:
    """Pixels (n, c, side, side) sampled on a square grid of the same size around an object.

    The mask (n, 1, h, h) in [0, 1] says where it is. The grid's middle is the mask's mean, its half
    side REACH standard deviations of the mask; a filled square's half side is 1.73 of them.
    """
    weights = (mask - FAINT).clamp(min=0) + 1e-4  # an empty mask means the whole picture
    weights = weights / weights.sum((-2, -1), keepdim=True)
    along = (torch.arange(mask.shape[-1], device=mask.device) + 0.5) * 2 / mask.shape[-1] - 1
    x, y = (weights * along).sum((1, 2, 3)), (weights * along[:, None]).sum((1, 2, 3))
    square = (weights * (along**2 + along[:, None] ** 2)).sum((1, 2, 3))
    reach = REACH * ((square - x**2 - y**2) / 2).clamp(min=0.01).sqrt()
    zero = torch.zeros_like(x)
    rows = torch.stack([reach, zero, x, zero, reach, y], dim=-1).view(-1, 2, 3)
    grid = F.affine_grid(rows, list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, "bicubic", padding_mode="border", align_corners=False)


def pool(features: Tensor) -> Tensor:
    """Mean and maximum of each channel, (n, C, h, w) to (n, 2C)."""
    return torch.cat([features.mean((-2, -1)), features.amax((-2, -1))], dim=-1)


def as_pixels(images: list[Image.Image], side: int) -> Tensor:
    """Pictures of any size and mode as (n, 3, side, side) in [-1, 1]."""
    small = [
        image.convert("RGB").resize((side, side), Image.Resampling.LANCZOS) for image in images
    ]
    stacked = torch.from_numpy(np.stack([np.asarray(image) for image in small]))
    return stacked.permute(0, 3, 1, 2).float() / 127.5 - 1


# --- the frozen judge --------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Judge:
    """A trained network with the names of its classes.

    A network with one answer more than there are nouns says "" where no noun can be seen.
    `prototypes` holds one unit vector per noun and style; `accuracy` what the judge itself gets
    right on scenes it never saw, to be quoted beside every figure it gives.
    """

    shape: Shape
    network: JudgeNetwork
    noun_names: tuple[str, ...]
    colour_names: tuple[str, ...]
    prototypes: Tensor  # (p, e)
    prototype_names: tuple[str, ...]
    threshold: float  # least similarity at which a picture shows a concept
    accuracy: dict

    @torch.no_grad()
    def pools(self, images: list[Image.Image]) -> tuple[Tensor, Tensor, Tensor]:
        """Pooled features (n, 2C) of whole pictures, of their left and of their right halves."""
        batches = as_pixels(images, self.shape.side).split(BATCH)
        coarse = torch.cat([self.network.features(batch) for batch in batches])
        return self.network.pools(coarse)

    def _named_nouns(self, pooled: Tensor) -> list[str]:
        answers = (*self.noun_names, "")
        return [answers[i] for i in self.network.noun(pooled).argmax(-1)]

    def nouns(self, images: list[Image.Image]) -> list[str]:
        """The noun of each picture of one object, "" where none can be seen."""
        return self._named_nouns(self.pools(images)[0])

    def pairs(self, images: list[Image.Image]) -> list[tuple[str, str]]:
        """The nouns in the left and the right half of each picture, "" where none can be seen."""
        _, left, right = self.pools(images)
        return list(zip(self._named_nouns(left), self._named_nouns(right), strict=True))

    def colours(self, images: list[Image.Image]) -> list[str]:
        """The background colour of each picture."""
        whole, _, _ = self.pools(images)
        return [self.colour_names[i] for i in self.network.colour(whole).argmax(-1)]

    @torch.no_grad()
    def embed(self, images: list[Image.Image], part: int = WHOLE) -> Tensor:
        """Unit vectors (n, e), one per picture, or per its LEFT or its RIGHT half."""
        batches = as_pixels(images, self.shape.side).split(BATCH)
        return torch.cat([self.network.embeddings(batch, part) for batch in batches])

    def prototype(self, photos: list[Image.Image]) -> Tensor:
        """Unit vector (e,): the direction of the photos' mean embedding."""
        return F.normalize(self.embed(photos).mean(0), dim=0)

    def identity(self, photos: list[Image.Image], pictures: list[Image.Image]) -> float:
        """Mean cosine in [-1, 1] between the pictures' embeddings and the photos' prototype."""
        return (self.embed(pictures) @ self.prototype(photos)).mean().item()

    def concept_scores(self, prototype: Tensor, embeddings: Tensor) -> Tensor:
        """Cosines (n,) of embeddings (n, e) to a prototype (e,); -1 where a noun is nearer."""
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
        **asdict(judge.shape),
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
    shape = _shape_in(header)
    network = JudgeNetwork(len(tensors["noun.bias"]), len(tensors["colour.bias"]), shape)
    network.load_state_dict(tensors)
    return Judge(
        shape,
        network.eval().requires_grad_(False),
        tuple(header["nouns"]),
        tuple(header["colours"]),
        prototypes,
        tuple(header["prototype_names"]),
        header["threshold"],
        header["accuracy"],
    )


def _shape_in(header: dict) -> Shape:
    """The sizes in a file's header; a file without them is the judge of 64 pixels."""
    if "stages" not in header:
        return Shape()
    stages = tuple((channels, blocks) for channels, blocks in header["stages"])
    sizes = (header[name] for name in ("embedding", "cells", "cell_channels"))
    return Shape(header["side"], stages, *sizes)


@cache
def load_judge() -> Judge:
    """The judge in the package."""
    with resources.as_file(
        resources.files("rite_diffusion.evaluation") / "judge.safetensors"
    ) as path:
        return read_judge(path)
