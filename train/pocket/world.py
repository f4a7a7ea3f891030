"""The pocket world: emoji on coloured grounds, with captions that say what is where.

A scene is drawn by a `numpy.random.Generator`, so a seed gives the same scenes everywhere.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from . import emoji

SIZE = 128  # pixels of a scene's side
STYLES = {"3d": ""}  # sets of emoji, and how a caption begins; two take twice as long to learn

COLOURS = {
    "red": (222, 52, 52),
    "orange": (250, 146, 36),
    "yellow": (250, 222, 64),
    "green": (62, 170, 80),
    "blue": (52, 110, 222),
    "purple": (142, 72, 190),
    "pink": (248, 160, 200),
    "white": (246, 246, 246),
    "gray": (142, 146, 150),
    "black": (30, 30, 34),
    "brown": (126, 84, 56),
    "cyan": (84, 206, 224),
}

# What the base models draw: nouns whose emoji has the same name, then the others.
_SAME = (
    "tiger rabbit horse pig frog bear chicken penguin bird duck owl turtle octopus crab butterfly "
    "whale elephant cactus sunflower rose mushroom carrot watermelon banana pineapple grapes "
    "strawberry hamburger pizza bus airplane rocket guitar key umbrella crown balloon star bell "
    "house bicycle castle robot cow shark dolphin giraffe koala mouse swan bat bee ant spider "
    "tulip pear cherries lemon tomato broccoli cookie bread taco egg candle camera trumpet drum "
    "hammer scissors lamp sofa anchor train ambulance motorcycle truck snowman cloud sun moon "
    "trophy kite book clock heart gift tree ball fish boat car cat dog"
).split()
_OTHER = {
    "monkey": "monkey-face",
    "lion": "lion",
    "fox": "fox",
    "fish": "tropical-fish",
    "tree": "evergreen-tree",
    "donut": "doughnut",
    "boat": "sailboat",
    "ball": "soccer-ball",
    "clock": "alarm-clock",
    "book": "closed-book",
    "heart": "red-heart",
    "ladybug": "lady-beetle",
    "corn": "ear-of-corn",
    "apple": "red-apple",
    "cake": "shortcake",
    "car": "automobile",
    "truck": "delivery-truck",
    "gift": "wrapped-gift",
    "bee": "honeybee",
    "whale": "spouting-whale",
    "sun": "sun-with-face",
    "moon": "crescent-moon",
    "lamp": "light-bulb",
    "sofa": "couch-and-lamp",
    "train": "locomotive",
    "tiger": "tiger-face",
    "horse": "horse-face",
    "pig": "pig-face",
    "rabbit": "rabbit-face",
    "cow": "cow-face",
    "mouse": "mouse-face",
    "cat": "cat-face",
    "dog": "dog-face",
}
NOUNS = {noun: noun for noun in _SAME} | _OTHER

CELLS = 16  # of a picture's side, each one latent
# Each place: the centre's x and the longer side, in cells.
PLACES = {"centre": (8.0, 12.0), "small": (8.0, 7.0), "left": (4.5, 7.0), "right": (11.5, 7.0)}


@dataclass(frozen=True)
class Description:
    """What a scene shows, in words and as facts."""

    caption: str
    nouns: tuple[str, ...]  # one, or left and right
    colour: str
    place: str  # of PLACES, or "pair"
    style: str


@dataclass(frozen=True)
class Scene(Description):
    """One picture with its caption and the facts that a judge needs."""

    image: np.ndarray  # (SIZE, SIZE, 3) uint8


def article(noun: str) -> str:
    """The noun with its article: "a cat", "an owl"."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def ground(
    rng: np.random.Generator | None,
    colour: tuple[float, ...],
    size: int = SIZE,
    slope: float = 9.0,
) -> np.ndarray:
    """Background (size, size, 3) float32 of one colour; `rng` gives a slight gradient and tint."""
    if rng is None:
        return np.full((size, size, 3), colour, np.float32)
    tint = np.asarray(colour, np.float32) + rng.normal(0, 5, 3).astype(np.float32)
    slopes = rng.normal(0, slope, 2).astype(np.float32)
    ramp = np.linspace(-1, 1, size, dtype=np.float32)
    shade = slopes[0] * ramp[:, None] + slopes[1] * ramp[None, :]
    return np.clip(tint + shade[..., None], 0, 255)


def paste(canvas: np.ndarray, image: Image.Image, centre: tuple[float, ...], extent: float) -> None:
    """Draw a sprite into a float canvas, its longer side `extent` pixels, at (x, y) `centre`."""
    ratio = extent / max(image.size)
    width, height = (max(2, round(side * ratio)) for side in image.size)
    small = np.asarray(image.resize((width, height), Image.Resampling.LANCZOS), np.float32)
    left, top = round(centre[0] - width / 2), round(centre[1] - height / 2)
    x0, y0 = max(left, 0), max(top, 0)
    x1, y1 = min(left + width, canvas.shape[1]), min(top + height, canvas.shape[0])
    if x0 >= x1 or y0 >= y1:
        return
    part = small[y0 - top : y1 - top, x0 - left : x1 - left]
    alpha = part[..., 3:] / 255
    canvas[y0:y1, x0:x1] = canvas[y0:y1, x0:x1] * (1 - alpha) + part[..., :3] * alpha


def draw(
    rng: np.random.Generator | None,
    images: list[Image.Image],
    colour: str,
    place: str = "centre",
    size: int = SIZE,
    aligned: bool = False,
) -> np.ndarray:
    """A picture (size, size, 3) uint8 of one sprite at a place, or of two side by side.

    The size varies by 8 % and the place by half a cell. With `aligned` both are the place's own, so
    that a sprite has the same latents in every scene. Without `rng` the ground is one plain colour.
    """
    canvas = ground(rng, COLOURS[colour], size)
    spots = [PLACES[place]] if len(images) == 1 else [PLACES["left"], PLACES["right"]]
    for image, (x, extent) in zip(images, spots, strict=True):
        off, ratio = np.zeros(2), 1.0
        if rng is not None and not aligned:
            off, ratio = rng.uniform(-0.5, 0.5, 2), rng.uniform(0.92, 1.08)
        centre = np.array([x, CELLS / 2]) + off
        paste(canvas, image, tuple(centre * size / CELLS), extent * ratio * size / CELLS)
    return canvas.round().astype(np.uint8)


def single_caption(rng: np.random.Generator, noun: str, colour: str, place: str) -> str:
    """A caption of one object: mostly the plain grammar, sometimes as people write prompts."""
    opening = rng.choice(["", "a picture of ", "a photo of "], p=[0.8, 0.1, 0.1])
    words = article(f"small {noun}" if place == "small" else noun)
    where = f" on the {place}" if place in ("left", "right") else ""
    ending = f" on {article(colour)} background" if rng.random() < 0.85 else ""
    return opening + words + where + ending


def pair_caption(rng: np.random.Generator, left: str, right: str, colour: str) -> str:
    """A caption of two objects; three of four say which is where."""
    forms = [
        f"{article(left)} on the left and {article(right)} on the right",
        f"{article(left)} beside {article(right)}",
        f"{article(left)} and {article(right)}",
    ]
    ending = f" on {article(colour)} background" if rng.random() < 0.85 else ""
    return str(rng.choice(forms, p=[0.7, 0.15, 0.15])) + ending


def described(rng: np.random.Generator, pairs: float = 0.4) -> Description:
    """A scene of the pocket world before it is drawn; a share `pairs` shows two objects."""
    style = str(rng.choice(list(STYLES)))
    colour = str(rng.choice(list(COLOURS)))
    if rng.random() < pairs:
        nouns = tuple(str(noun) for noun in rng.choice(list(NOUNS), 2, replace=False))
        place, caption = "pair", pair_caption(rng, *nouns, colour)
    else:
        nouns = (str(rng.choice(list(NOUNS))),)
        place = str(rng.choice(list(PLACES), p=[0.7, 0.1, 0.1, 0.1]))
        caption = single_caption(rng, *nouns, colour, place)
    return Description(STYLES[style] + caption, nouns, colour, place, style)


def scene(rng: np.random.Generator, pairs: float = 0.4) -> Scene:
    """A captioned scene of the pocket world; a share `pairs` shows two objects."""
    facts = described(rng, pairs)
    images = [emoji.sprites().image(facts.style, NOUNS[noun]) for noun in facts.nouns]
    place = "centre" if facts.place == "pair" else facts.place
    return Scene(**vars(facts), image=draw(rng, images, facts.colour, place, aligned=True))
