"""Make `examples/photos`: folders of pictures of things that the base model has never seen.

Three held-out emoji and a robot of our own stand on coloured grounds like the pocket world's; the
cat is a real photograph, cropped six ways. Every run writes the same files.

    python train/examples.py
"""

import argparse
from pathlib import Path

import numpy as np
import skimage
from PIL import Image

import world
from robot import robot

SIZE = 256  # pixels of a picture's side
QUALITY = 92  # of the JPEG files
PHOTOS = Path(__file__).parents[1] / "examples/photos"

EMOJI = {"unicorn": "unicorn_face", "cupcake": "cupcake", "tractor": "tractor"}

# Each folder: the ground's colour -> where the object stands. The colours that a folder leaves out
# are for trying the taught concept on a ground that it was not taught on.
SHOTS = {
    "unicorn": {
        "yellow": "centre",
        "black": "centre",
        "orange": "centre",
        "red": "centre",
        "gray": "left",
        "pink": "small",
    },
    "cupcake": {
        "gray": "centre",
        "yellow": "centre",
        "purple": "centre",
        "black": "centre",
        "orange": "right",
        "red": "left",
    },
    "tractor": {
        "pink": "centre",
        "red": "centre",
        "gray": "centre",
        "yellow": "centre",
        "purple": "left",
        "orange": "small",
    },
    "robot": {
        "purple": "centre",
        "pink": "centre",
        "yellow": "centre",
        "black": "centre",
        "red": "left",
        "gray": "right",
    },
}

# Squares of chelsea.png (451 x 300 pixels): left, top and side, with the caption.
CROPS = [
    (75, 0, 300, "a photo of <chelsea>"),
    (115, 60, 240, "a close-up photo of <chelsea>, the whole face"),
    (5, 0, 300, "a photo of <chelsea>, looking to the side"),
    (128, 0, 300, "a photo of <chelsea>, looking to the side, a blurred room behind"),
    (215, 0, 215, "a close-up photo of <chelsea>, one eye and one ear"),
    (165, 135, 165, "a close-up photo of <chelsea>, the nose and the whiskers"),
]


def subject(name: str) -> Image.Image:
    """RGBA picture of what the folder `name` teaches."""
    return robot() if name == "robot" else world.sprite(EMOJI[name], "3d")


def caption(trigger: str, colour: str, place: str) -> str:
    """Caption in the pocket world's plain grammar, with the trigger in the noun's place."""
    words = f"a small {trigger}" if place == "small" else f"a {trigger}"
    where = f" on the {place}" if place in ("left", "right") else ""
    return f"{words}{where} on {world.article(colour)} background"


def drawn(name: str) -> list[tuple[Image.Image, str]]:
    """Pictures of one of the drawn folders, with captions; its name is the seed."""
    image = subject(name)
    rng = np.random.default_rng(list(name.encode()))
    return [
        (
            Image.fromarray(world.draw(rng, [image], colour, place, SIZE)),
            caption(f"<{name}>", colour, place),
        )
        for colour, place in SHOTS[name].items()
    ]


def chelsea() -> list[tuple[Image.Image, str]]:
    """Crops of scikit-image's photograph of a cat, with captions."""
    photo = Image.open(Path(skimage.__file__).parent / "data/chelsea.png").convert("RGB")
    lanczos = Image.Resampling.LANCZOS
    return [
        (photo.resize((SIZE, SIZE), lanczos, (left, top, left + side, top + side)), text)
        for left, top, side, text in CROPS
    ]


def save(pictures: list[tuple[Image.Image, str]], folder: Path) -> None:
    """Write each picture as a JPEG file, its caption beside it as a text file."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (image, text) in enumerate(pictures, start=1):
        path = folder / f"{folder.name}_{number}.jpg"
        image.save(path, quality=QUALITY)
        path.with_suffix(".txt").write_text(text + "\n", encoding="utf-8")


def main() -> None:
    """Write every example folder."""
    parser = argparse.ArgumentParser(description="Make the example concept folders.")
    parser.add_argument("--out", type=Path, default=PHOTOS, help="where the folders go")
    out = parser.parse_args().out
    world.fetch_emoji()
    for name in SHOTS:
        save(drawn(name), out / name)
    save(chelsea(), out / "chelsea")


if __name__ == "__main__":
    main()
