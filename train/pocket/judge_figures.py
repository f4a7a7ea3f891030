"""The judge's threshold, and what it gets right on scenes and concepts that it never saw."""

from dataclasses import replace
from functools import cache

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from rite_diffusion.evaluation.judge import Judge, JudgeNetwork, Shape
from train import robot as toy

from . import judge_sprites as sprites
from . import robots, world
from .judge_pictures import (
    CHANGES,
    NEAR_MISSES,
    Change,
    blurred,
    concept_keys,
    held_out_keys,
    near_miss,
    near_misses,
    scenes_of,
    test_concepts,
)

CALIBRATION_SEED, TEST_SEED = 920_000, 930_000
PASSING = 0.1  # share of near misses that may pass for a concept
PHOTOS, PICTURES = 6, 8  # of each concept
NOUN_PHOTOS = 16  # of each noun and style
SCENES = 600  # with one object, and half as many with two
SIGMAS = tuple(0.5 * i for i in range(9))  # pixels of blur, 0 to 4


# --- threshold ---------------------------------------------------------------------------------


def with_prototypes(judge: Judge) -> Judge:
    """The judge with a prototype per noun and style, from sharp scenes."""
    keys = [(noun, (style, world.NOUNS[noun])) for noun in world.NOUNS for style in world.STYLES]
    photos = [
        scenes_of(sprites.picture(key), NOUN_PHOTOS, CALIBRATION_SEED, 0, i)
        for i, (_, key) in enumerate(keys)
    ]
    prototypes = torch.stack([judge.prototype(images) for images in photos])
    names = tuple(f"{world.STYLES[style]}{noun}" for noun, (style, _) in keys)
    return replace(judge, prototypes=prototypes, prototype_names=names)


def least_refusing(scores: Tensor) -> float:
    """The threshold that the share PASSING of near misses' scores (n,) is above."""
    return round(scores.quantile(1 - PASSING).item(), 3)


def calibrated(judge: Judge) -> Judge:
    """The judge with the threshold that refuses near misses of emoji kept aside."""
    scores = []
    for number, key in enumerate(concept_keys(sprites.spare_names())):
        photos = scenes_of(sprites.picture(key), PHOTOS, CALIBRATION_SEED, 1, number)
        pictures = [p for kind in NEAR_MISSES for p in near_misses(key, kind, 2, CALIBRATION_SEED)]
        scores.append(judge.concept_scores(judge.prototype(photos), judge.embed(pictures)))
    return replace(judge, threshold=least_refusing(torch.cat(scores)))


# --- measurement -------------------------------------------------------------------------------


def share(hits: list[bool] | Tensor) -> float:
    """Share of hits, to four digits."""
    return round(torch.as_tensor(hits).float().mean().item(), 4)


@cache
def world_scenes(count: int, is_pair: bool) -> list[world.Scene]:
    """Unseen scenes of the world with one object, or with two."""
    return [
        world.scene(np.random.default_rng([TEST_SEED, i]), pairs=float(is_pair))
        for i in range(count)
    ]


def naming(judge: Judge, change: Change) -> dict[str, float]:
    """Accuracy of nouns, pairs and colours on scenes after a change, and how many get no noun."""
    singles, pairs = world_scenes(SCENES, False), world_scenes(SCENES // 2, True)
    images = [[change(Image.fromarray(s.image)) for s in kind] for kind in (singles, pairs)]
    nouns, both = judge.nouns(images[0]), judge.pairs(images[1])
    colours = zip(judge.colours(images[0] + images[1]), singles + pairs, strict=True)
    return {
        "noun": share([(noun,) == s.nouns for noun, s in zip(nouns, singles, strict=True)]),
        "no_noun": share([noun == "" for noun in nouns]),
        "pair": share([pair == s.nouns for pair, s in zip(both, pairs, strict=True)]),
        "colour": share([colour == s.colour for colour, s in colours]),
    }


def recognition(judge: Judge) -> dict[str, dict]:
    """Per kind of picture: the mean identity, and how often concepts are recognised."""
    concepts = list(enumerate(test_concepts().values()))
    photos = [scenes_of(sprite, PHOTOS, TEST_SEED, 1, i) for i, sprite in concepts]
    pictures = [scenes_of(sprite, PICTURES, TEST_SEED, 2, i) for i, sprite in concepts]
    prototypes = [judge.prototype(images) for images in photos]
    found = {}
    for name, change in CHANGES.items():
        embeddings = [judge.embed([change(image) for image in images]) for images in pictures]
        identities = [e @ p for e, p in zip(embeddings, prototypes, strict=True)]
        scores = [judge.concept_scores(p, torch.cat(embeddings)) for p in prototypes]
        accepted = torch.stack(scores) > judge.threshold  # (concepts, pictures)
        is_own = torch.eye(len(photos), dtype=torch.bool).repeat_interleave(PICTURES, 1)
        found[name] = {
            "identity": round(torch.cat(identities).mean().item(), 4),
            "recognised": share(accepted[is_own]),
            "robot_recognised": share(accepted[-1, -PICTURES:]),
            "other_concepts_mistaken": share(accepted[~is_own]),
        }
    return found


def mistaken(judge: Judge) -> dict[str, float]:
    """How often near misses of each kind, other robots and nouns pass for a concept."""
    found: dict[str, list[Tensor]] = {kind: [] for kind in (*NEAR_MISSES, "nouns")}
    nouns = judge.embed(
        [Image.fromarray(scene.image) for scene in world_scenes(SCENES // 5, False)]
    )
    for number, key in enumerate(held_out_keys()):
        prototype = judge.prototype(scenes_of(sprites.picture(key), PHOTOS, TEST_SEED, 1, number))
        found["nouns"].append(judge.concept_scores(prototype, nouns))
        for kind in NEAR_MISSES:
            if pictures := near_misses(key, kind, 4, TEST_SEED):
                found[kind].append(judge.concept_scores(prototype, judge.embed(pictures)))
    known = {kind: torch.cat(scores) for kind, scores in found.items() if scores}
    return {kind: share(scores > judge.threshold) for kind, scores in known.items()}


def robots_mistaken(judge: Judge) -> dict[str, float]:
    """How often each of the other robots passes for the example robot."""
    prototype = judge.prototype(scenes_of(toy.robot(), PHOTOS, TEST_SEED, 3))
    found = {}
    for number, (name, picture) in enumerate(robots.pictures().items()):
        embeddings = judge.embed(scenes_of(picture, 2 * PICTURES, TEST_SEED, 4, number))
        found[name] = share(judge.concept_scores(prototype, embeddings) > judge.threshold)
    return found


def rank_correlation(one: Tensor, other: Tensor) -> Tensor:
    """Spearman's correlation along the last dimension, of numbers without ties."""
    ranks = [values.argsort(-1).argsort(-1).double() for values in (one, other)]
    centred = [r - r.mean(-1, keepdim=True) for r in ranks]
    norms = [r.square().sum(-1).sqrt() for r in centred]
    return (centred[0] * centred[1]).sum(-1) / (norms[0] * norms[1])


def softness(judge: Judge) -> dict:
    """Mean identity at each blur, and the rank correlation of blur and identity per picture."""
    curves = []
    for number, sprite in enumerate(test_concepts().values()):
        prototype = judge.prototype(scenes_of(sprite, PHOTOS, TEST_SEED, 1, number))
        pictures = scenes_of(sprite, 4, TEST_SEED, 2, number)
        soft = [blurred(sigma)(image) for image in pictures for sigma in SIGMAS]
        curves.append((judge.embed(soft) @ prototype).view(len(pictures), len(SIGMAS)))
    identities = torch.cat(curves)  # (pictures, sigmas)
    correlation = rank_correlation(identities, torch.tensor(SIGMAS).expand_as(identities))
    means = [round(value, 4) for value in identities.mean(0).tolist()]
    return {
        "identity": dict(zip(map(str, SIGMAS), means, strict=True)),
        "spearman": round(correlation.mean().item(), 4),
        "least_spearman": round(correlation.min().item(), 4),
    }


def measured(network: JudgeNetwork, shape: Shape) -> Judge:
    """The judge with prototypes, threshold and accuracy."""
    nothing = torch.zeros(0, shape.embedding)
    judge = Judge(shape, network, tuple(world.NOUNS), tuple(world.COLOURS), nothing, (), 0.0, {})
    judge = calibrated(with_prototypes(judge))
    return replace(judge, accuracy=accuracy(judge))


def accuracy(judge: Judge) -> dict[str, dict]:
    """What the judge gets right, per kind of picture."""
    recognised = recognition(judge)
    pictures = {name: naming(judge, change) | recognised[name] for name, change in CHANGES.items()}
    return {
        "pictures": pictures,
        "mistaken": mistaken(judge),
        "robots_mistaken": robots_mistaken(judge),
        "blur": softness(judge),
    }


# --- contact sheet -----------------------------------------------------------------------------

SHOWN = ("3d unicorn", "3d cupcake", "flat tractor", "flat panda", "3d teapot", "flat parrot")
SHOWN += ("3d snail", "flat hedgehog", "flat violin", "3d sushi", "robot")


def _row(sprite: Image.Image, name: str, number: int) -> list[tuple[str, Image.Image]]:
    """Labelled pictures of one concept: made poor, then near misses or other robots."""
    rng = np.random.default_rng([TEST_SEED, number])
    colour = str(rng.choice(list(world.COLOURS)))

    def scene(image: Image.Image) -> Image.Image:
        return Image.fromarray(world.draw(np.random.default_rng(number), [image], colour))

    shown = [(kind, change(scene(sprite))) for kind, change in CHANGES.items()]
    if name == "robot":
        return shown + [(kind, scene(image)) for kind, image in robots.pictures().items()]
    key = tuple(name.split(" ", 1))
    others = [(kind, near_miss(rng, (key[0], key[1]), kind)) for kind in NEAR_MISSES]
    return shown + [(kind, scene(other)) for kind, other in others if other]


def contact_sheet(judge: Judge) -> Image.Image:
    """Concepts by kinds of pictures, the identity under each, a frame where it is recognised."""
    cell, line = 136, 26
    concepts = test_concepts()
    names = [name for name in SHOWN if name in concepts]
    columns = len(CHANGES) + max(len(NEAR_MISSES), len(robots.ROBOTS))
    sheet = Image.new("RGB", (columns * cell, len(names) * (cell + line)), "white")
    pen = ImageDraw.Draw(sheet)
    for row, name in enumerate(names):
        number = list(concepts).index(name)
        prototype = judge.prototype(scenes_of(concepts[name], PHOTOS, TEST_SEED, 1, number))
        shown = _row(concepts[name], name, number)
        embeddings = judge.embed([picture for _, picture in shown])
        accepted = judge.concept_scores(prototype, embeddings) > judge.threshold
        for column, (kind, picture) in enumerate(shown):
            x, y = column * cell, row * (cell + line)
            frame = "green" if accepted[column] else "white"
            pen.rectangle((x, y, x + cell - 1, y + cell - 1), frame)
            sheet.paste(picture, (x + 4, y + 4))
            pen.text((x + 4, y + cell), f"{kind}\n{embeddings[column] @ prototype:.2f}", "black")
    return sheet
