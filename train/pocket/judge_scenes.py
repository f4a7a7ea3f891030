"""What the judge is trained on: batches of sharp scenes, of near misses and of poor pictures.

Scenes are composed by other code than a base's. Each group of a batch has two pictures of one
sprite, two of near misses, and one of the sprite made poor, with the cosines that they may have.
"""

import io
import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from . import judge_sprites as sprites
from . import made_up, world
from .flaws import forgiven, poor
from .judge_sprites import Generator, Key, Sprite

SIZE = world.SIZE
CELLS = SIZE // 4  # of a mask's side, as of the features that the judge looks for objects in
NOUNS, COLOURS = tuple(world.NOUNS), tuple(world.COLOURS)
NOTHING = len(NOUNS)  # label of what no noun names
UNKNOWN = -1  # label of a question that a picture does not answer

# Where an object stands: x and longer side in pixels, share of the scenes.
PLACES = {
    "centre": (64, 96, 0.6),
    "small": (64, 52, 0.14),
    "left": (34, 58, 0.13),
    "right": (94, 58, 0.13),
}
GROUPS, PAIRS, BLANKS = 12, 8, 2  # of a batch
BATCH = 5 * GROUPS + PAIRS + BLANKS  # pictures
NAMED, NAMELESS = 0.7, 0.35  # deserved cosines: above the first a noun, below the second none


# --- sharp pictures ----------------------------------------------------------------------------


def ground(rng: Generator) -> tuple[Image.Image, int]:
    """A background with a slight slope, and the index of its colour; now and then any colour."""
    index = int(rng.integers(len(COLOURS)))
    tint, spread = np.array(world.COLOURS[COLOURS[index]], float), 5.0
    if rng.random() < 0.15:
        index, tint, spread = UNKNOWN, rng.uniform(0, 255, 3), 15.0
    ramp = np.linspace(-1, 1, SIZE)
    slopes = rng.normal(0, 10, 2)
    shade = slopes[0] * ramp[:, None, None] + slopes[1] * ramp[None, :, None]
    array = tint + rng.normal(0, spread, 3) + shade
    return Image.fromarray(array.clip(0, 255).round().astype(np.uint8)), index


def put(
    rng: Generator, canvas: Image.Image, mask: Image.Image, image: Image.Image, place: str
) -> None:
    """Draw an RGBA picture near a place, a little larger or smaller and perhaps turned.

    The mask, a grey picture, is white where something was drawn.
    """
    x, extent, _ = PLACES[place]
    ratio = extent * rng.uniform(0.87, 1.13) / max(image.size)
    size = tuple(max(2, round(side * ratio)) for side in image.size)
    image = image.resize(size, Image.Resampling.LANCZOS)
    if rng.random() < 0.4:
        image = image.rotate(rng.uniform(-8, 8), Image.Resampling.BICUBIC, expand=True)
    left = x + rng.uniform(-7, 7) - image.width / 2
    top = SIZE / 2 + rng.uniform(-7, 7) - image.height / 2
    corner = round(left), round(top)
    canvas.paste(image, corner, image)
    mask.paste(255, (*corner, corner[0] + image.width, corner[1] + image.height), image)


def any_place(rng: Generator) -> str:
    """A place, drawn by its share."""
    return str(rng.choice(list(PLACES), p=[share for _, _, share in PLACES.values()]))


def as_pixels(rng: Generator, canvas: Image.Image) -> Tensor:
    """A picture (3, SIZE, SIZE) in [0, 1], a fifth of them after JPEG's loss."""
    if rng.random() < 0.2:
        file = io.BytesIO()
        canvas.save(file, "JPEG", quality=int(rng.integers(70, 96)))
        canvas = Image.open(file)
    return torch.from_numpy(np.array(canvas)).permute(2, 0, 1).float() / 255


# --- batches -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """A sprite with its label for identity (equal for equal sprites) and for nouns."""

    image: Image.Image
    identity: int
    noun: int


@cache
def noun_keys() -> dict[Key, int]:
    """The index of the noun that a key's emoji shows, for those that show one."""
    emoji_of = {name: index for index, name in enumerate(world.NOUNS.values())}
    return {key: emoji_of[key[1]] for key in sprites.training_keys() if key[1] in emoji_of}


@cache
def noun_words() -> set[str]:
    """The words in the names of nouns: what shares one may look like a noun."""
    return {word for pair in world.NOUNS.items() for name in pair for word in name.split("-")}


def noun_of(rng: Generator, key: Key) -> int:
    """The noun that a sprite shows, NOTHING, or UNKNOWN where it may resemble one."""
    if key in noun_keys():
        return noun_keys()[key]
    if sprites.is_figure(key):
        return NOTHING
    is_like_a_noun = noun_words() & set(key[1].split("-"))
    return UNKNOWN if is_like_a_noun or rng.random() < 0.7 else NOTHING


def any_key(rng: Generator) -> Key:
    """A noun's emoji, most of the styles of a base, or any other sprite."""
    keys = sprites.training_keys()
    if rng.random() < 0.6:
        styles = list(world.STYLES) if rng.random() < 0.8 else list({*("fluent", "twemoji")})
        key = (str(rng.choice(sorted(styles))), str(rng.choice(list(world.NOUNS.values()))))
        if key in noun_keys():
            return key
    return keys[rng.integers(len(keys))]


@dataclass(frozen=True)
class Group:
    """A subject, near misses of it, and the cosines to it that these may have at most."""

    subject: Subject
    near: tuple[Subject, Subject]
    allowed: tuple[float, float]


def random_group(rng: Generator, number: int) -> Group:
    """A group of any sprite; a quarter are altered themselves, so that being altered does not tell.

    A near miss's identity is UNKNOWN where it looks like the subject.
    """
    key = any_key(rng)
    original = sprites.sprite(sprites.picture(key))
    array, noun, label = original, noun_of(rng, key), sprites.training_keys().index(key)
    if not sprites.is_figure(key) and rng.random() < 0.25:
        array, noun, label = sprites.altered(rng, original), UNKNOWN, -2 - 3 * number
    others = (relative(rng, key, original, array), sprites.altered(rng, array))
    near = tuple(
        Subject(
            sprites.as_image(other),
            -3 - 3 * number - i if sprites.differs(other, array) else UNKNOWN,
            UNKNOWN,
        )
        for i, other in enumerate(others)
    )
    allowed = tuple(allowed_cosine(sprites.difference(other, array)) for other in others)
    return Group(Subject(sprites.as_image(array), label, noun), near, allowed)


def allowed_cosine(difference: float) -> float:
    """The cosine that a near miss may have: 0.85 where it is hardly seen, 0.5 if it is obvious."""
    return 0.45 + 0.4 * math.exp(-(difference - sprites.CHANGE) / 0.03)


def relative(rng: Generator, key: Key, original: Sprite, array: Sprite) -> Sprite:
    """A sprite of the same kind as `array`, which is the key's or an altered one."""
    if array is not original and rng.random() < 0.5:
        return original
    if rng.random() < 0.3:
        return sprites.altered(rng, array)
    return sprites.sprite(sprites.picture(sprites.relative(rng, key)))


@dataclass(frozen=True)
class Example:
    """Pixels (3, SIZE, SIZE) in [0, 1], where something is drawn (1, CELLS, CELLS), and labels."""

    pixels: Tensor
    mask: Tensor
    labels: dict[str, int]


def example(
    rng: Generator, subjects: dict[str, Subject], labels: dict[str, int] | None = None
) -> Example:
    """A picture of subjects by their places, with its labels and the colour's."""
    canvas, colour = ground(rng)
    mask = Image.new("L", canvas.size)
    for place, subject in subjects.items():
        put(rng, canvas, mask, subject.image, place)
    covered = torch.from_numpy(np.array(mask.reduce(SIZE // CELLS)))[None].float() / 255
    return Example(as_pixels(rng, canvas), covered, (labels or {}) | {"colour": colour})


def single(rng: Generator, subject: Subject, place: str) -> Example:
    """A picture of one subject."""
    labels = {"identity": subject.identity, "noun": subject.noun}
    if place in ("left", "right"):
        labels |= {"left": NOTHING, "right": NOTHING} | {place: subject.noun}
    return example(rng, {place: subject}, labels)


def pair(rng: Generator, left: Subject, right: Subject) -> Example:
    """A picture of two subjects."""
    labels = {"left": left.noun, "right": right.noun}
    labels |= {"left_identity": left.identity, "right_identity": right.identity}
    return example(rng, {"left": left, "right": right}, labels)


def blank(rng: Generator) -> Example:
    """A background alone."""
    return example(rng, {}, {"noun": NOTHING, "left": NOTHING, "right": NOTHING})


LABELS = ("identity", "left_identity", "right_identity", "noun", "left", "right", "colour")


def batch(seed: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
    """Pixels (n, 3, SIZE, SIZE) in [-1, 1], labels (n,), and the cosines of near and poor pictures.

    The first GROUPS pictures and the next are of the groups' subjects, then come twice as many near
    misses, poor pictures, pairs and blanks. `allowed` has a number per near miss, `deserved` one
    per poor picture.
    """
    rng = np.random.default_rng([made_up.SEED, *seed])
    groups = [random_group(rng, number) for number in range(GROUPS)]
    own = [group.subject for group in groups]
    near = [group.near[i] for i in (0, 1) for group in groups]
    made = [single(rng, subject, any_place(rng)) for subject in (*own, *own, *near, *own)]
    for first in range(PAIRS):
        second = (first + 1 + int(rng.integers(GROUPS - 1))) % GROUPS
        made.append(pair(rng, own[first], own[second]))
    made += [blank(rng) for _ in range(BLANKS)]
    labels = {
        name: torch.tensor([each.labels.get(name, UNKNOWN) for each in made]) for name in LABELS
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(rng.integers(2**31)))
        pixels = forgiven(torch.stack([each.pixels for each in made]) * 2 - 1)
        rows = slice(4 * GROUPS, 5 * GROUPS)
        pixels[rows], deserved = poor(pixels[rows])
    _unname(labels, rows, deserved)
    allowed = torch.tensor([group.allowed[i] for i in (0, 1) for group in groups])
    labels |= {"allowed": allowed, "deserved": deserved}
    return pixels.clamp(-1, 1), labels | {"mask": torch.stack([each.mask for each in made])}


def _unname(labels: dict[str, Tensor], rows: slice, deserved: Tensor) -> None:
    """Poor pictures have no identity; the poorest show nothing, those in between no known noun."""
    labels["identity"][rows] = UNKNOWN
    for name in ("noun", "left", "right"):
        answer = labels[name][rows]
        is_asked = (
            answer != UNKNOWN if name != "noun" else torch.ones_like(answer, dtype=torch.bool)
        )
        answer = answer.where(deserved > NAMED, UNKNOWN)
        labels[name][rows] = answer.where(~is_asked | (deserved > NAMELESS), NOTHING)
