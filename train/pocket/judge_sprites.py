"""What the judge tells apart: emoji, made-up figures, and near misses of both.

A sprite is a float32 array (SIDE, SIDE, 4) in [0, 1], its colours multiplied by its opacity.
"""

import json
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from . import emoji, world
from .made_up import FIGURES, VARIANTS, Generator, figure

SIDE = emoji.SIDE
CHANGE = 0.01  # mean difference of two sprites that a person notices
TRIES = 5  # until a near miss is one
Sprite = np.ndarray


# --- all that can be told apart ----------------------------------------------------------------

Key = tuple[str, str]  # (set, name) of an emoji, or ("figure 12", "3")


@cache
def spare_names() -> tuple[str, ...]:
    """Names of emoji kept from the judge's training, to set its threshold."""
    nouns = set(world.NOUNS.values())
    return tuple(sorted({name for _, name in emoji.training_keys()} - nouns)[::16])


@cache
def training_keys() -> tuple[Key, ...]:
    """Every emoji that the judge may be trained on, and the made-up figures."""
    spare = set(spare_names())
    figures = [(f"figure {i}", str(j)) for i in range(FIGURES) for j in range(VARIANTS)]
    return (*(key for key in emoji.training_keys() if key[1] not in spare), *figures)


def is_figure(key: Key) -> bool:
    """Whether a key names a made-up figure."""
    return key[0].startswith("figure ")


def picture(key: Key) -> Image.Image:
    """RGBA picture of a key."""
    if is_figure(key):
        return figure(int(key[0].split()[1]), int(key[1]))
    return emoji.sprites().image(*key)


@cache
def categories(folder: Path = emoji.FOLDER) -> dict[str, str]:
    """The category ("Food & Drink") of emoji by name, as Noto's package has it."""
    content = json.loads((folder / "flat/package/metadata.json").read_text())
    return {name: kind for kind, names in content["categories"].items() for name in names}


@cache
def kin() -> dict[tuple[str, str], tuple[Key, ...]]:
    """Training emoji of one set by (set, category) and by (set, word of their names)."""
    found: dict[tuple[str, str], list[Key]] = {}
    for key in training_keys():
        if is_figure(key):
            continue
        for kind in (categories().get(key[1], ""), *key[1].split("-")):
            found.setdefault((key[0], kind), []).append(key)
    return {kind: tuple(keys) for kind, keys in found.items()}


def sprite(image: Image.Image) -> Sprite:
    """An RGBA picture, whose longer side is SIDE, in the middle of a sprite."""
    square = Image.new("RGBA", (SIDE, SIDE))
    square.paste(image, ((SIDE - image.width) // 2, (SIDE - image.height) // 2))
    array = np.asarray(square, np.float32) / 255
    return np.concatenate([array[..., :3] * array[..., 3:], array[..., 3:]], -1)


def as_image(array: Sprite) -> Image.Image:
    """RGBA picture of a sprite."""
    colours = array[..., :3] / np.maximum(array[..., 3:], 1e-4)
    straight = np.concatenate([colours, array[..., 3:]], -1).clip(0, 1)
    return Image.fromarray((straight * 255).round().astype(np.uint8))


# --- near misses: sprites that a person tells from the original --------------------------------


def region(rng: Generator, array: Sprite, radii: tuple[float, float] = (9, 30)) -> np.ndarray:
    """Mask (SIDE, SIDE, 1) of an ellipse in the visible part, mostly where there is detail."""
    inside = np.argwhere(array[..., 3] > 0.5)
    grey = array[..., :3].sum(-1)
    detail = np.abs(np.diff(grey, axis=0, prepend=0)) + np.abs(np.diff(grey, axis=1, prepend=0))
    y, x = np.mgrid[:SIDE, :SIDE]
    masks = []
    for row, column in inside[rng.integers(len(inside), size=3)] if len(inside) else [(64, 64)]:
        high, wide = rng.uniform(*radii, 2)
        reach = ((y - row) / high) ** 2 + ((x - column) / wide) ** 2
        masks.append(np.clip((1 - reach) * min(high, wide) / 2, 0, 1)[..., None])
    energies = [(detail[..., None] * mask * (array[..., 3:] > 0.9)).sum() for mask in masks]
    chosen = int(np.argmax(energies)) if rng.random() < 0.7 else 0
    return masks[chosen].astype(np.float32)


def painted_over(rng: Generator, array: Sprite) -> Sprite:
    """A part has the colour of one of the sprite's pixels."""
    mask = region(rng, array)
    visible = array[array[..., 3] > 0.9]
    colour = visible[rng.integers(len(visible))][:3] if len(visible) else np.zeros(3, np.float32)
    mask = mask * array[..., 3:]
    return np.concatenate([array[..., :3] * (1 - mask) + colour * mask, array[..., 3:]], -1)


def part_lost(rng: Generator, array: Sprite) -> Sprite:
    """A part is gone."""
    return array * (1 - region(rng, array, (12, 32)))


def part_moved(rng: Generator, array: Sprite) -> Sprite:
    """A part shows what is elsewhere in the sprite."""
    mask, shift = region(rng, array), rng.integers(10, 40, 2) * rng.choice([-1, 1], 2)
    return array * (1 - mask) + np.roll(array, tuple(shift), (0, 1)) * mask


def smeared(rng: Generator, array: Sprite) -> Sprite:
    """A part is blurred beyond recognition."""
    mask, sigma = region(rng, array, (14, 36)), rng.uniform(4, 8)
    bytes_ = (array * 255).round().astype(np.uint8)
    bands = [Image.fromarray(bytes_[..., i]) for i in range(4)]
    soft = [np.asarray(band.filter(ImageFilter.GaussianBlur(sigma))) for band in bands]
    return array * (1 - mask) + np.stack(soft, -1).astype(np.float32) / 255 * mask


def half_mirrored(rng: Generator, array: Sprite) -> Sprite:
    """One half is the other's mirror image, left and right or top and bottom."""
    axis = int(rng.random() < 0.7)
    turned = np.flip(array, axis) if rng.random() < 0.5 else array
    other, kept = np.flip(turned, axis), np.arange(SIDE) < SIDE // 2
    return np.where(kept[:, None, None] if axis == 0 else kept[None, :, None], turned, other)


def hue_turned(rng: Generator, array: Sprite) -> Sprite:
    """All colours have another hue: a rotation about the grey axis."""
    angle = rng.uniform(0.25, 0.75) * 2 * np.pi
    cosine, sine = np.cos(angle), np.sin(angle) / np.sqrt(3)
    turn = np.full((3, 3), (1 - cosine) / 3) + cosine * np.eye(3)
    turn += sine * np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]])
    colours = array[..., :3] @ turn.T.astype(np.float32)
    return np.concatenate([colours.clip(0, array[..., 3:]), array[..., 3:]], -1)


def one_colour_changed(rng: Generator, array: Sprite) -> Sprite:
    """What has about one colour has another one."""
    visible = array[array[..., 3] > 0.9]
    if not len(visible):
        return array
    colour = visible[rng.integers(len(visible))][:3]
    distance = np.square(array[..., :3] - colour * array[..., 3:]).sum(-1, keepdims=True)
    weight = np.exp(-distance / 0.04) * array[..., 3:]
    other = rng.uniform(0, 1, 3).astype(np.float32)
    colours = array[..., :3] + weight * (other - colour)
    return np.concatenate([colours.clip(0, array[..., 3:]), array[..., 3:]], -1)


ALTERATIONS = {
    "painted over": painted_over,
    "part lost": part_lost,
    "part moved": part_moved,
    "smeared": smeared,
    "half mirrored": half_mirrored,
    "hue turned": hue_turned,
    "one colour changed": one_colour_changed,
}


LEAST_CHANGES = {"half mirrored": 3 * CHANGE}  # where a small change is easily overlooked


def difference(one: Sprite, other: Sprite) -> float:
    """Mean absolute difference of two sprites."""
    return float(np.abs(one - other).mean())


def differs(one: Sprite, other: Sprite) -> bool:
    """Whether a person tells two sprites apart."""
    return difference(one, other) > CHANGE


def altered(rng: Generator, array: Sprite, kinds: tuple[str, ...] = tuple(ALTERATIONS)) -> Sprite:
    """The sprite with one visible change of some kind; itself where none was found."""
    for _ in range(TRIES):
        kind = str(rng.choice(kinds))
        changed = ALTERATIONS[kind](rng, array)
        if difference(changed, array) > LEAST_CHANGES.get(kind, CHANGE):
            return changed.astype(np.float32)
    return array


def relative(rng: Generator, key: Key) -> Key:
    """The key of a sprite of the same kind: another style, a like name, the same category.

    The key itself where there is none.
    """
    if is_figure(key):
        others = [(key[0], str(i)) for i in range(VARIANTS)]
    elif rng.random() < 0.5:
        others = [
            (style, key[1]) for style in emoji.SETS if (style, key[1]) in emoji.sprites().keys
        ]
    else:
        words = [*key[1].split("-"), categories().get(key[1], "")]
        others = [k for k in kin().get((key[0], str(rng.choice(words))), ()) if k[1] != key[1]]
    others = [other for other in others if other != key]
    return others[rng.integers(len(others))] if others else key
