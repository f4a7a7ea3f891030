"""Pictures of fused concepts and what the judge makes of them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from PIL import Image
from prompts import CONCEPTS, article

from rite_diffusion.adapters.attach import attach, detach
from rite_diffusion.adapters.choice import choose_adapters
from rite_diffusion.api.demo import example_photos
from rite_diffusion.backbones.protocols import Backbone
from rite_diffusion.backbones.source import load_backbone
from rite_diffusion.evaluation.judge import LEFT, RIGHT, load_judge
from rite_diffusion.generation.attached import Attached, as_attached
from rite_diffusion.generation.denoise import decode_pictures, denoising, sample
from rite_diffusion.generation.regional import regionally_guided
from rite_diffusion.generation.regions import Region
from rite_diffusion.photos.folder import read_folder
from rite_diffusion.photos.images import to_tensor
from rite_diffusion.types import Concept

OTHERS = ("dog", "apple", "house", "fish")  # drawn without a trigger, to see the drift
STEPS, GUIDANCE = 15, 3.0
PRECISION = "bf16"  # of training and drawing: half of the time on processors that know it


@cache
def base() -> Backbone:
    """The pocket base."""
    return load_backbone("pocket", PRECISION)


@cache
def photos_of(concept: str) -> list[Image.Image]:
    """The photos that a concept was learned from."""
    named = Concept(f"<{concept}>", CONCEPTS[concept][0])
    folder = read_folder(example_photos(concept), named, ["a {trigger}"])
    return [photo.image for photo in folder.photos]


@contextmanager
def in_base(files: Sequence[Path]) -> Iterator[list[Attached]]:
    """The adapters in the base, until the block ends."""
    chosen = choose_adapters(files)
    attached = as_attached(chosen)
    for each, place in zip(chosen, attached, strict=True):
        attach(base(), each.adapter, place.name)
    try:
        yield attached
    finally:
        for place in attached:
            detach(base(), place.name)


def draw(prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
    """Every prompt with every seed, prompt by prompt, in one batch."""
    each = [prompt for prompt in prompts for _ in seeds]
    return sample(base(), each, list(seeds) * len(prompts), steps=STEPS, guidance=GUIDANCE)


def concept_pictures(concept: str, seeds: Sequence[int]) -> list[Image.Image]:
    """The concept on backgrounds that its photos do not show."""
    return draw([f"a <{concept}> on {article(c)} background" for c in CONCEPTS[concept][1]], seeds)


@cache
def pictures_alone(file: Path, concept: str, seeds: tuple[int, ...]) -> list[Image.Image]:
    """The same by the concept's own adapter alone."""
    with in_base([file]):
        return concept_pictures(concept, seeds)


def scores(concept: str, others: list[str], drawn: list[Image.Image]) -> dict[str, float]:
    """Identity, share recognised, and share in which another concept is nearer."""
    judge = load_judge()
    seen = judge.embed(drawn)
    own = seen @ judge.prototype(photos_of(concept))
    rest = torch.stack([seen @ judge.prototype(photos_of(other)) for other in others]).amax(0)
    recognised = judge.recognised(photos_of(concept), drawn)
    return {
        "identity": own.mean().item(),
        "recognised": sum(recognised) / len(recognised),
        "leak": (rest > own).double().mean().item(),
    }


def bound(drawn: list[Image.Image], first: str, second: str) -> float:
    """Share of pictures whose left half is the first concept and whose right half is the second.

    A half is a concept where its embedding is nearer to the concept's photos than to any noun, and
    than to the other concept.
    """
    judge = load_judge()
    one, two = (judge.prototype(photos_of(name)) for name in (first, second))
    left, right = judge.embed(drawn, LEFT), judge.embed(drawn, RIGHT)
    is_first = judge.concept_scores(one, left) > (left @ two).clamp(min=0)
    is_second = judge.concept_scores(two, right) > (right @ one).clamp(min=0)
    return (is_first & is_second).double().mean().item()


def binding(concepts: list[str], attached: list[Attached], seeds: list[int]) -> dict[str, float]:
    """How often two concepts of a prompt stand where they were asked for."""
    first, second = concepts[:2]
    ground = "on a blue background"
    prompt = f"a <{first}> on the left and a <{second}> on the right {ground}"
    regions = [
        Region(0.0, 0.0, 0.55, 1.0, f"a <{first}> on the left {ground}"),
        Region(0.45, 0.0, 1.0, 1.0, f"a <{second}> on the right {ground}"),
    ]
    if len(attached) == len(concepts):  # unfused: each region has its own concept's adapter alone
        regions = [
            replace(region, weights=tuple(float(place == n) for n in range(len(attached))))
            for place, region in enumerate(regions)
        ]
    side = base().resolution
    predict = regionally_guided(
        base(), prompt, regions, negative="", guidance=GUIDANCE, width=side, height=side,
        count=len(seeds), adapters=attached,
    )  # fmt: skip
    *_, latents = denoising(base(), predict, seeds, steps=STEPS)
    return {
        "binding": bound(draw([prompt], seeds), first, second),
        "binding_regions": bound(decode_pictures(base(), latents), first, second),
    }


def other_pictures() -> torch.Tensor:
    """Pictures without a trigger (n, 3, 64, 64)."""
    prompts = [f"{article(noun)} on a blue background" for noun in OTHERS]
    return torch.stack([to_tensor(image) for image in draw(prompts, [0, 1])])


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Root mean square difference of pictures in [-1, 1]."""
    return (one - other).square().mean().sqrt().item()
