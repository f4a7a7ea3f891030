"""The pocket world: emoji on coloured grounds, with captions that say what is where.

A scene is drawn by a `numpy.random.Generator`, so a seed gives the same scenes everywhere. Sprites
come from two npm packages (see NOTICE); `fetch_emoji` gets them with `npm pack`.
"""

import json
import subprocess
import tarfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = 64  # pixels of a scene's side
EMOJI = Path(__file__).parent / "emoji"  # where the npm packages are unpacked; not in git
PACKAGES = {"flat": "emoji-datasource-google@16.0.0", "3d": "@lobehub/fluent-emoji-3d@1.1.0"}
STYLES = {"flat": "", "3d": "3d style, "}  # how a caption begins

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
}

# What the base model draws: the noun in captions -> the emoji's short name.
NOUNS = {
    noun: noun
    for noun in (
        "cat dog tiger rabbit horse pig frog bear chicken penguin bird duck owl turtle "
        "octopus crab butterfly bee ladybug whale elephant cactus sunflower rose mushroom "
        "corn carrot watermelon banana pineapple apple grapes strawberry hamburger pizza cake "
        "car bus truck airplane rocket guitar key umbrella crown gift balloon star bell house"
    ).split()
} | {
    "monkey": "monkey_face",
    "lion": "lion_face",
    "fox": "fox_face",
    "fish": "tropical_fish",
    "tree": "evergreen_tree",
    "donut": "doughnut",
    "bicycle": "bike",
    "boat": "boat",
    "robot": "robot_face",
    "ball": "soccer",
    "clock": "alarm_clock",
    "book": "closed_book",
    "heart": "hearts",
    "castle": "european_castle",
}

# Held out of everything the base model and its autoencoder see, in every style.
HELD_OUT = ("unicorn_face", "cupcake", "tractor", "parrot", "panda_face", "teapot", "dragon_face")


@dataclass(frozen=True)
class Scene:
    """One picture with its caption and the facts that a judge needs."""

    image: np.ndarray  # (64, 64, 3) uint8
    caption: str
    nouns: tuple[str, ...]  # one, or left and right
    colour: str


def fetch_emoji(folder: Path = EMOJI) -> None:
    """Download and unpack the emoji packages into `folder` unless they are there."""
    for style, package in PACKAGES.items():
        target = folder / style
        if target.is_dir():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        packed = subprocess.run(
            ["npm", "pack", "--silent", package],
            cwd=folder,
            check=True,
            capture_output=True,
            text=True,
        )
        with tarfile.open(folder / packed.stdout.strip().splitlines()[-1]) as archive:
            archive.extractall(target, filter="data")


@cache
def _records() -> dict[str, dict]:
    records = json.loads((EMOJI / "flat/package/emoji.json").read_text())
    return {name: record for record in records for name in record["short_names"]}


@cache
def sprite(short_name: str, style: str) -> Image.Image | None:
    """RGBA sprite of an emoji, cropped to what is visible; None where the style lacks it."""
    record = _records()[short_name]
    codes = [code.lower() for code in (record["unified"], record.get("non_qualified")) if code]
    paths = (
        [EMOJI / "flat/package/img/google/64" / record["image"]]
        if style == "flat"
        else [EMOJI / "3d/package/assets" / f"{code}.webp" for code in codes]
    )
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        return None
    image = Image.open(path).convert("RGBA")
    return image.crop(image.getchannel("A").point(lambda a: 255 * (a > 8)).getbbox())


def all_names() -> list[str]:
    """Short names of the emoji in the five pictorial categories, without the held-out ones."""
    wanted = ("Animals & Nature", "Food & Drink", "Objects", "Travel & Places", "Activities")
    records = (record for record in _records().values() if record["category"] in wanted)
    return sorted({record["short_name"] for record in records} - set(HELD_OUT))


def all_sprites() -> list[Image.Image]:
    """Every one of those emoji in both styles."""
    found = (sprite(name, style) for name in all_names() for style in STYLES)
    return [image for image in found if image is not None]


def article(noun: str) -> str:
    """The noun with its article: "a cat", "an owl"."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def ground(rng: np.random.Generator, colour: tuple[int, int, int], size: int = SIZE) -> np.ndarray:
    """Background (size, size, 3) float32 of one colour with a slight gradient and tint."""
    tint = np.asarray(colour, np.float32) + rng.normal(0, 5, 3)
    slope = rng.normal(0, 9, 2)
    ramp = np.linspace(-1, 1, size, dtype=np.float32)
    shade = slope[0] * ramp[:, None] + slope[1] * ramp[None, :]
    return np.clip(tint + shade[..., None], 0, 255)


def paste(
    canvas: np.ndarray, image: Image.Image, centre: tuple[float, float], extent: float
) -> None:
    """Draw a sprite into a float canvas, its longer side `extent` pixels, at (x, y) `centre`."""
    ratio = extent / max(image.size)
    width, height = (max(2, round(side * ratio)) for side in image.size)
    small = np.asarray(image.resize((width, height), Image.Resampling.LANCZOS), np.float32)
    left, top = round(centre[0] - width / 2), round(centre[1] - height / 2)
    x0, y0 = max(left, 0), max(top, 0)
    x1, y1 = min(left + width, canvas.shape[1]), min(top + height, canvas.shape[0])
    part = small[y0 - top : y1 - top, x0 - left : x1 - left]
    alpha = part[..., 3:] / 255
    canvas[y0:y1, x0:x1] = canvas[y0:y1, x0:x1] * (1 - alpha) + part[..., :3] * alpha


def draw(
    rng: np.random.Generator,
    images: list[Image.Image],
    colour: str,
    place: str = "centre",
    size: int = SIZE,
) -> np.ndarray:
    """A picture (size, size, 3) uint8 of one sprite at a place, or of two side by side."""
    canvas = ground(rng, COLOURS[colour], size)
    unit = size / SIZE
    x, extent = {"centre": (32, 48), "small": (32, 26), "left": (17, 29), "right": (47, 29)}[place]
    spots = [(x, extent)] if len(images) == 1 else [(17, 29), (47, 29)]
    for image, (x, extent) in zip(images, spots, strict=True):
        wobble = rng.uniform(-2, 2, 2)
        centre = ((x + wobble[0]) * unit, (32 + wobble[1]) * unit)
        paste(canvas, image, centre, extent * rng.uniform(0.92, 1.08) * unit)
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


def scene(rng: np.random.Generator) -> Scene:
    """A captioned scene of the pocket world: 70 % one object, 30 % two."""
    style = str(rng.choice(list(STYLES)))
    colour = str(rng.choice(list(COLOURS)))
    if rng.random() < 0.3:
        nouns = tuple(str(noun) for noun in rng.choice(list(NOUNS), 2, replace=False))
        place, caption = "pair", pair_caption(rng, *nouns, colour)
    else:
        nouns = (str(rng.choice(list(NOUNS))),)
        place = str(rng.choice(["centre", "small", "left", "right"], p=[0.7, 0.1, 0.1, 0.1]))
        caption = single_caption(rng, *nouns, colour, place)
    images = [sprite(NOUNS[noun], style) for noun in nouns]
    image = draw(rng, images, colour, "centre" if place == "pair" else place)
    return Scene(image, STYLES[style] + caption, nouns, colour)


@cache
def photographs() -> list[Image.Image]:
    """Freely licensed photographs that scikit-image and scikit-learn ship (see NOTICE)."""
    import skimage
    import sklearn

    names = (
        "astronaut.png coffee.png hubble_deep_field.jpg brick.png grass.png gravel.png retina.jpg "
    )
    names += "ihc.png coins.png"
    paths = [Path(skimage.__file__).parent / "data" / name for name in names.split()]
    paths += [
        Path(sklearn.__file__).parent / "datasets/images" / n for n in ("china.jpg", "flower.jpg")
    ]
    return [Image.open(path).convert("RGB") for path in paths]


def photo_crop(rng: np.random.Generator) -> np.ndarray:
    """A random square of a photograph, (64, 64, 3) uint8."""
    images = photographs()
    image = images[rng.integers(len(images))]
    side = int(rng.uniform(96, min(image.size)))
    x, y = (int(rng.integers(0, extent - side + 1)) for extent in image.size)
    crop = image.crop((x, y, x + side, y + side)).resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    return np.asarray(crop)


def clutter(rng: np.random.Generator, sprites: list[Image.Image]) -> np.ndarray:
    """One to three random emoji, turned and mirrored, on a random gradient: for the autoencoder."""
    canvas = ground(rng, tuple(rng.uniform(0, 255, 3)))
    for _ in range(rng.integers(1, 4)):
        image = sprites[rng.integers(len(sprites))]
        image = image.rotate(rng.uniform(-40, 40), Image.Resampling.BILINEAR, expand=True)
        paste(canvas, image, tuple(rng.uniform(10, 54, 2)), rng.uniform(22, 60))
    return canvas.round().astype(np.uint8)


def any_image(rng: np.random.Generator, sprites: list[Image.Image]) -> np.ndarray:
    """An image for the autoencoder: half scenes, a third clutter, the rest photographs."""
    kind = rng.random()
    if kind < 0.5:
        return scene(rng).image
    return clutter(rng, sprites) if kind < 0.8 else photo_crop(rng)
