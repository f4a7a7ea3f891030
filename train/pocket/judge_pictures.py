"""What the judge is measured on: pictures of concepts that it never saw, of their near misses.

They are drawn by `world.draw` and made poor by Pillow: other code than the training's.
"""

import io
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFilter

from train import robot as toy

from . import emoji, world
from . import judge_sprites as sprites
from .judge_sprites import Key

Images = list[Image.Image]
Change = Callable[[Image.Image], Image.Image]


# --- what may happen to a picture --------------------------------------------------------------


def blurred(sigma: float) -> Change:
    """Gaussian blur of `sigma` pixels."""
    return lambda image: image.filter(ImageFilter.GaussianBlur(sigma))


def compressed(image: Image.Image) -> Image.Image:
    """The picture after JPEG with quality 85."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    return Image.open(file).convert("RGB")


def from_few_pixels(image: Image.Image) -> Image.Image:
    """The picture from 40 by 40 pixels."""
    return image.resize((40, 40), Image.Resampling.BOX).resize(image.size, Image.Resampling.BICUBIC)


def blotchy(image: Image.Image) -> Image.Image:
    """The picture with blotches of about eight pixels and a deviation of 20 in 255."""
    array = np.asarray(image, np.float32)
    rng = np.random.default_rng(int(array.sum()))
    coarse = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
    blotches = np.asarray(coarse.resize(image.size, Image.Resampling.BICUBIC), np.float32)
    blotches = (blotches - blotches.mean()) / blotches.std() * 20
    return Image.fromarray((array + blotches).clip(0, 255).round().astype(np.uint8))


def bent(image: Image.Image) -> Image.Image:
    """The picture with its shapes bent by up to four pixels, in waves of 40."""
    array = np.asarray(image)
    y, x = np.mgrid[: image.height, : image.width]
    down, right = (4 * np.sin(2 * np.pi * along / 40) for along in (x, y))
    rows = (y + down).round().astype(int).clip(0, image.height - 1)
    return Image.fromarray(array[rows, (x + right).round().astype(int).clip(0, image.width - 1)])


CHANGES: dict[str, Change] = {
    "sharp": lambda image: image,
    "compressed": compressed,
    "blurred by 0.6": blurred(0.6),
    "blurred by 1.2": blurred(1.2),
    "blurred by 2": blurred(2.0),
    "blurred by 3": blurred(3.0),
    "from 40 pixels": from_few_pixels,
    "blotchy": blotchy,
    "bent": bent,
}


# --- concepts and their near misses ------------------------------------------------------------


def scenes_of(sprite: Image.Image, count: int, *seed: int) -> Images:
    """Pictures of one sprite in the pocket world, anywhere and on any ground."""
    pictures = []
    for i in range(count):
        rng = np.random.default_rng([*seed, i])
        place = str(rng.choice(list(world.PLACES), p=[0.7, 0.1, 0.1, 0.1]))
        colour = str(rng.choice(list(world.COLOURS)))
        pictures.append(Image.fromarray(world.draw(rng, [sprite], colour, place)))
    return pictures


def concept_keys(names: tuple[str, ...]) -> list[Key]:
    """The keys of emoji in the styles of a base."""
    every = [(style, name) for name in names for style in world.STYLES]
    return [key for key in every if key in emoji.sprites().keys]


NEAR_MISSES = (*sprites.ALTERATIONS, "other style", "same category")


def near_miss(rng: np.random.Generator, key: Key, kind: str) -> Image.Image | None:
    """A picture that a person tells from the key's, None where there is none of that kind."""
    original = sprites.sprite(sprites.picture(key))
    match kind:
        case "other style":
            others = [(style, key[1]) for style in emoji.SETS if style != key[0]]
            others = [other for other in others if other in emoji.sprites().keys]
        case "same category":
            category = sprites.categories().get(key[1], "")
            others = [k for k in sprites.kin().get((key[0], category), ()) if k != key]
        case _:
            changed = sprites.altered(rng, original, (kind,))
            return sprites.as_image(changed) if sprites.differs(changed, original) else None
    if not others:
        return None
    other = sprites.picture(others[rng.integers(len(others))])
    return other if sprites.differs(sprites.sprite(other), original) else None


def near_misses(key: Key, kind: str, count: int, seed: int) -> Images:
    """Pictures of near misses of one kind, each of another one; fewer where there are fewer."""
    found: Images = []
    for i in range(count):
        numbers = [seed, *f"{key}{kind}".encode(), i]
        other = near_miss(np.random.default_rng(numbers), key, kind)
        found += scenes_of(other, 1, *numbers) if other else []
    return found


def test_concepts() -> dict[str, Image.Image]:
    """RGBA pictures of what the judge never saw: held-out emoji and the drawn robot."""
    found = {f"{style} {name}": sprites.picture((style, name)) for style, name in held_out_keys()}
    return found | {"robot": toy.robot()}


def held_out_keys() -> list[Key]:
    """Keys of the held-out emoji in the styles of a base."""
    return concept_keys(emoji.HELD_OUT)
