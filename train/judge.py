"""Make the judge: `python train/judge.py --work DIR`, about 25 minutes on one core.

Trains the network of `rite_diffusion.evaluation.judge` on scenes of `judge_scenes`, calibrates
on emoji kept aside at which similarity a picture counts as a concept, measures the judge on scenes
and concepts that it never saw, and writes the package's judge.safetensors and
benchmarks/results/judge.json. DIR gets a judge of the moment, `judge.safetensors`, on the way.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

import judge_scenes as scenes
import world
from rite_diffusion.evaluation.judge import Judge, JudgeNetwork, Shape, as_pixels, save_judge

ROOT = Path(__file__).parents[1]
WEIGHTS = ROOT / "rite_diffusion/evaluation/judge.safetensors"
FIGURES = ROOT / "benchmarks/results/judge.json"

CALIBRATION_SEED, TEST_SEED = 910_000, 920_000
BATCH = 64
RATE = 2e-3
SHARPNESS, MARGIN = 20.0, 0.2  # scale and margin of the cosine softmax
SHAPE = Shape()  # of the network
PHOTOS, PICTURES = 6, 40  # of each concept, when recognition is measured
MILD_BLUR = 1.0  # pixels

Images = list[Image.Image]


# --- training ----------------------------------------------------------------------------------


class IdentityLoss(nn.Module):
    """Cross-entropy of cosines to one centre per class, with a margin (CosFace, Wang 2018)."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.centres = nn.Parameter(F.normalize(torch.randn(classes, SHAPE.embedding), dim=-1))

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Mean loss over the pictures whose label is known."""
        known = labels != scenes.UNKNOWN
        cosines = embeddings[known] @ F.normalize(self.centres, dim=-1).T
        margins = MARGIN * F.one_hot(labels[known], cosines.shape[1])
        return F.cross_entropy(SHARPNESS * (cosines - margins), labels[known])


def losses(
    network: JudgeNetwork, identity: IdentityLoss, pixels: Tensor, labels: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The loss of each question on a batch of `scenes.random_scenes`."""
    with torch.autocast("cpu", torch.bfloat16):
        features = network.features(pixels.contiguous(memory_format=torch.channels_last))
    whole, left, right = network.pools(features.float())
    answers = {
        "noun": network.noun(whole),
        "left": network.noun(left),
        "right": network.noun(right),
        "colour": network.colour(whole),
    }
    found = {
        name: F.cross_entropy(answer, labels[name], ignore_index=scenes.UNKNOWN)
        for name, answer in answers.items()
    }
    return found | {
        "identity": identity(F.normalize(network.identity(whole), dim=-1), labels["identity"])
    }


def rate_at(step: int, steps: int) -> float:
    """Learning rate: a warm-up of 200 steps, then a cosine to zero."""
    return RATE * min(1.0, (step + 1) / 200) * (0.5 + 0.5 * math.cos(math.pi * step / steps))


def train(steps: int, checkpoint: Callable[[JudgeNetwork, str], None]) -> JudgeNetwork:
    """A trained network; every 500 steps `checkpoint` gets it with a line of progress."""
    torch.manual_seed(scenes.SEED)
    network = JudgeNetwork(len(scenes.NOUNS), len(scenes.COLOURS))
    network = network.to(memory_format=torch.channels_last)
    identity = IdentityLoss(len(scenes.identities()))
    weights = [*network.parameters(), *identity.parameters()]
    optimizer = torch.optim.AdamW(weights, RATE, weight_decay=0.05)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate_at(step, steps)
        found = losses(network, identity, *scenes.random_scenes(BATCH))
        optimizer.zero_grad()
        sum(found.values()).backward()
        nn.utils.clip_grad_norm_(weights, 5.0)
        optimizer.step()
        if (step + 1) % 500 == 0 or step + 1 == steps:
            figures = " ".join(f"{name} {loss.item():.3f}" for name, loss in found.items())
            checkpoint(network, f"{step + 1}/{steps} {figures}")
    return network.eval()


# --- calibration -------------------------------------------------------------------------------


def scenes_of(sprite: Image.Image, count: int, *seed: int) -> Images:
    """Pictures of one sprite in the pocket world, anywhere and on any ground."""
    pictures = []
    for i in range(count):
        rng = np.random.default_rng([*seed, i])
        place = str(rng.choice(["centre", "small", "left", "right"], p=[0.7, 0.1, 0.1, 0.1]))
        colour = str(rng.choice(scenes.COLOURS))
        pictures.append(Image.fromarray(world.draw(rng, [sprite], colour, place)))
    return pictures


def concept_sets(sprites: Images, count: int, seed: int) -> tuple[list[Images], Images]:
    """Photos of each sprite, and `count` other pictures of each, all in one list."""
    photos = [scenes_of(sprite, PHOTOS, seed, 1, i) for i, sprite in enumerate(sprites)]
    pictures = [scenes_of(sprite, count, seed, 2, i) for i, sprite in enumerate(sprites)]
    return photos, [picture for images in pictures for picture in images]


def noun_prototypes(judge: Judge) -> Judge:
    """The judge with a prototype per noun and style, from clean scenes."""
    names = [(noun, style) for noun in scenes.NOUNS for style in world.STYLES]
    sprites = [world.sprite(world.NOUNS[noun], style) for noun, style in names]
    photos = [scenes_of(s, 24, CALIBRATION_SEED, 0, i) for i, s in enumerate(sprites)]
    prototypes = torch.stack([judge.prototype(images) for images in photos])
    labels = tuple(f"{world.STYLES[style]}{noun}" for noun, style in names)
    return replace(judge, prototypes=prototypes, prototype_names=labels)


def soft(images: Images) -> Images:
    """The images after a mild blur."""
    pixels = scenes.blurred(
        as_pixels(images, SHAPE.side), torch.full((len(images), 1, 1, 1), MILD_BLUR)
    )
    array = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(image) for image in array]


def calibrated(judge: Judge) -> Judge:
    """The judge with the threshold that best parts emoji kept aside from each other."""
    sprites = list(scenes.in_each_style(scenes.emoji_names()[1]).values())
    photos, pictures = concept_sets(sprites, 10, CALIBRATION_SEED)
    embeddings = judge.embed([*pictures, *soft(pictures)])
    scores = torch.stack([judge.concept_scores(judge.prototype(p), embeddings) for p in photos])
    is_own = torch.eye(len(sprites), dtype=torch.bool).repeat_interleave(10, 1).repeat(1, 2)
    own, strange = scores[is_own], scores[~is_own]
    thresholds = torch.linspace(0, 1, 201)
    gain = [(own > t).float().mean() - (strange > t).float().mean() for t in thresholds]
    return replace(judge, threshold=thresholds[torch.stack(gain).argmax()].item())


# --- measurement -------------------------------------------------------------------------------


def share(hits: list[bool] | Tensor) -> float:
    """Share of hits, to four digits."""
    return round(torch.as_tensor(hits).float().mean().item(), 4)


def world_scenes(count: int, is_pair: bool) -> list[world.Scene]:
    """Unseen scenes of the world with one object, or with two."""
    found, seed = [], 0
    while len(found) < count:
        scene = world.scene(np.random.default_rng([TEST_SEED, seed]))
        found += [scene] if (len(scene.nouns) == 2) == is_pair else []
        seed += 1
    return found


def naming(judge: Judge, change: Callable[[Images], Images]) -> dict[str, float]:
    """Accuracy of nouns, pairs and colours on scenes after a change."""
    singles, pairs = world_scenes(2000, False), world_scenes(1000, True)
    images = [change([Image.fromarray(s.image) for s in kind]) for kind in (singles, pairs)]
    nouns = zip(judge.nouns(images[0]), singles, strict=True)
    both = zip(judge.pairs(images[1]), pairs, strict=True)
    colours = zip(judge.colours(images[0] + images[1]), singles + pairs, strict=True)
    return {
        "noun": share([(noun,) == scene.nouns for noun, scene in nouns]),
        "pair": share([pair == scene.nouns for pair, scene in both]),
        "colour": share([colour == scene.colour for colour, scene in colours]),
    }


def recognition(
    judge: Judge, sprites: Images, change: Callable[[Images], Images]
) -> dict[str, float]:
    """How often concepts are recognised, and how often nouns or other concepts pass for them."""
    photos, pictures = concept_sets(sprites, PICTURES, TEST_SEED)
    nouns = [Image.fromarray(scene.image) for scene in world_scenes(500, False)]
    embeddings = judge.embed(change([*pictures, *nouns]))
    scores = torch.stack([judge.concept_scores(judge.prototype(p), embeddings) for p in photos])
    accepted = scores > judge.threshold  # (concepts, pictures and nouns)
    is_own = torch.eye(len(sprites), dtype=torch.bool).repeat_interleave(PICTURES, 1)
    concepts, strangers = accepted.split([len(pictures), len(nouns)], 1)
    return {
        "recognised": share(concepts[is_own]),
        "nouns_mistaken": share(strangers),
        "other_concepts_mistaken": share(concepts[~is_own]),
    }


def accuracy(judge: Judge) -> dict[str, dict]:
    """What the judge gets right on unseen scenes and concepts, clean and mildly blurred."""
    emoji = list(scenes.in_each_style(world.HELD_OUT).values())
    drawn = [scenes.drawing(scenes.DRAWINGS + i) for i in range(12)]
    return {
        name: naming(judge, change)
        | {"concept": recognition(judge, emoji, change)}
        | {"drawn_concept": recognition(judge, drawn, change)}
        for name, change in (("clean", list), ("blurred", soft))
    }


def unmeasured(network: JudgeNetwork) -> Judge:
    """A judge before calibration and measurement."""
    prototypes = torch.zeros(0, SHAPE.embedding)
    return Judge(SHAPE, network, scenes.NOUNS, scenes.COLOURS, prototypes, (), 0.0, {})


def main() -> None:
    """Train, calibrate, measure and write the judge."""
    parser = argparse.ArgumentParser(description="Make the judge of the pocket world.")
    parser.add_argument("--work", type=Path, default=Path("runs/judge"), help="for checkpoints")
    parser.add_argument("--steps", type=int, default=3000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    world.fetch_emoji()
    options.work.mkdir(parents=True, exist_ok=True)
    start = time.time()

    def checkpoint(network: JudgeNetwork, line: str) -> None:
        save_judge(unmeasured(network), options.work / "judge.safetensors")
        print(f"{time.time() - start:.0f} s  {line}", flush=True)

    network = train(options.steps, checkpoint)
    judge = calibrated(noun_prototypes(unmeasured(network)))
    judge = replace(judge, accuracy=accuracy(judge))
    save_judge(judge, WEIGHTS)
    FIGURES.parent.mkdir(parents=True, exist_ok=True)
    figures = {"accuracy": judge.accuracy, "threshold": judge.threshold}
    figures |= {"command": "python train/judge.py", "seconds": round(time.time() - start)}
    FIGURES.write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
