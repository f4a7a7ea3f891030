"""Pictures of fused concepts and what the judge makes of them."""

from functools import cache
from pathlib import Path

import torch
from concepts import CONCEPTS, article
from PIL import Image

from rite_diffusion.adapters import attach, load_adapter
from rite_diffusion.backbones import load_backbone
from rite_diffusion.demo import example_photos
from rite_diffusion.evaluation.judge import as_pixels, load_judge
from rite_diffusion.fusion.members import triggers_of
from rite_diffusion.generation.regional import Attached, sample_regions
from rite_diffusion.generation.regions import Region
from rite_diffusion.generation.sampler import Sampling, sample
from rite_diffusion.photos.folder import read_folder
from rite_diffusion.photos.images import to_tensor
from rite_diffusion.types import Backbone, Concept

OTHERS = ("dog", "apple", "house", "fish")  # drawn without a trigger, to see the drift
SAMPLING = Sampling(negative="", steps=15, guidance=3.0)


@cache
def base() -> Backbone:
    """The pocket base."""
    return load_backbone("pocket")


@cache
def photos_of(concept: str) -> list[Image.Image]:
    """The photos that a concept was learned from."""
    named = Concept(f"<{concept}>", CONCEPTS[concept][0])
    folder = read_folder(example_photos(concept), named, ["a {trigger}"])
    return [photo.image for photo in folder.photos]


def attach_all(files: list[Path], weights: list[float]) -> list[Attached]:
    """Put adapters into the base."""
    found = []
    for index, (path, weight) in enumerate(zip(files, weights, strict=True)):
        adapter = load_adapter(path)
        attach(base(), adapter, f"bench_{index}", weight)
        found.append(Attached(f"bench_{index}", weight, triggers_of(adapter.info)))
    return found


def draw(prompts: list[str], seeds: list[int]) -> list[Image.Image]:
    """Every prompt with every seed, prompt by prompt."""
    return [
        image
        for prompt in prompts
        for image in sample(base(), [prompt] * len(seeds), seeds, **vars(SAMPLING))
    ]


def concept_scores(concept: str, others: list[str], seeds: list[int]) -> dict[str, float]:
    """Identity, share recognised, and share in which another concept is nearer."""
    judge = load_judge()
    prompts = [f"a <{concept}> on {article(c)} background" for c in CONCEPTS[concept][1]]
    pictures = draw(prompts, seeds)
    seen = judge.embed(pictures)
    own = seen @ judge.prototype(photos_of(concept))
    rest = torch.stack([seen @ judge.prototype(photos_of(other)) for other in others]).amax(0)
    recognised = judge.recognised(photos_of(concept), pictures)
    return {
        "identity": own.mean().item(),
        "recognised": sum(recognised) / len(recognised),
        "leak": (rest > own).double().mean().item(),
    }


def halves(pictures: list[Image.Image]) -> tuple[torch.Tensor, torch.Tensor]:
    """The judge's embeddings (n, 64) of the left and of the right halves."""
    network = load_judge().network
    with torch.no_grad():
        _, left, right = network.pooled(network.features(as_pixels(pictures)))
        return network.embedding(left), network.embedding(right)


def bound(pictures: list[Image.Image], first: str, second: str) -> float:
    """Share of pictures whose left half is nearer to the first concept, the right to the second."""
    judge = load_judge()
    one, two = (judge.prototype(photos_of(name)) for name in (first, second))
    left, right = halves(pictures)
    return ((left @ one > left @ two) & (right @ two > right @ one)).double().mean().item()


def binding(concepts: list[str], attached: list[Attached], seeds: list[int]) -> dict[str, float]:
    """How often two concepts of a prompt stand where they were asked for."""
    first, second = concepts[:2]
    ground = "on a blue background"
    prompt = f"a <{first}> on the left and a <{second}> on the right {ground}"
    plain = draw([prompt], seeds)
    regions = [
        Region(0.0, 0.0, 0.55, 1.0, f"a <{first}> {ground}"),
        Region(0.45, 0.0, 1.0, 1.0, f"a <{second}> {ground}"),
    ]
    regional = sample_regions(base(), prompt, regions, seeds, SAMPLING, attached)
    return {
        "binding": bound(plain, first, second),
        "binding_regions": bound(regional, first, second),
    }


def other_pictures() -> torch.Tensor:
    """Pictures without a trigger (n, 3, 64, 64)."""
    prompts = [f"{article(noun)} on a blue background" for noun in OTHERS]
    return torch.stack([to_tensor(image) for image in draw(prompts, [0, 1])])
