"""The photos' report: folders with one fault each, and good folders, which stay quiet."""

from pathlib import Path
from shutil import copytree

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont, ImageOps

import rite_diffusion as rite
from rite_diffusion.api.demo import example_photos
from rite_diffusion.photos.caption_words import concept_words
from rite_diffusion.types import Concept

NOUNS = {"robot": "robot", "cupcake": "cake", "tractor": "truck", "unicorn": "horse"}
NOUNS["chelsea"] = "cat"


def _example(name: str, tmp_path: Path) -> Path:
    return copytree(example_photos(name), tmp_path / name)


def _found(folder: Path, name: str) -> dict[str, list[tuple[str, ...]]]:
    """Kind of finding -> the photos of each."""
    kinds: dict[str, list[tuple[str, ...]]] = {}
    for each in rite.check_photos(folder, f"<{name}>", NOUNS[name]):
        kinds.setdefault(each.kind, []).append(each.photos)
    return kinds


def _change(path: Path, change) -> None:
    change(Image.open(path).convert("RGB")).save(path, quality=90)


def _cut(image: Image.Image, left: float, top: float, right: float, bottom: float) -> Image.Image:
    width, height = image.size
    box = (left * width, top * height, width - right * width, height - bottom * height)
    return image.crop([round(side) for side in box])


@pytest.mark.parametrize("name", NOUNS)
def test_the_example_photos_have_no_findings(name):
    assert _found(example_photos(name), name) == {}


@pytest.mark.parametrize("name", NOUNS)
def test_a_blurred_photo_is_named(name, tmp_path):
    folder = _example(name, tmp_path)
    path = folder / f"{name}_2.jpg"
    _change(path, lambda image: image.filter(ImageFilter.GaussianBlur(0.015 * image.width)))
    assert _found(folder, name) == {"blurred": [(path.name,)]}


def test_a_photo_that_was_scaled_up_is_named_as_blurred(tmp_path):
    folder = _example("chelsea", tmp_path)
    path = folder / "chelsea_3.jpg"
    _change(path, lambda image: image.resize((40, 40)).resize((512, 512)))
    assert _found(folder, "chelsea") == {"blurred": [(path.name,)]}


@pytest.mark.parametrize("name", ["robot", "cupcake", "tractor", "unicorn"])
def test_a_tiny_subject_is_named(name, tmp_path):
    folder = _example(name, tmp_path)
    path = folder / f"{name}_1.jpg"

    def far(image: Image.Image) -> Image.Image:
        whole = Image.new("RGB", (768, 768), image.getpixel((3, 3)))
        whole.paste(image.resize((160, 160)), (300, 260))
        return whole

    _change(path, far)
    assert _found(folder, name)["tiny"] == [(path.name,)]


@pytest.mark.parametrize("name", ["robot", "chelsea"])
def test_a_letterbox_and_a_frame_are_named(name, tmp_path):
    folder = _example(name, tmp_path)
    first, second = folder / f"{name}_1.jpg", folder / f"{name}_2.jpg"
    _change(first, lambda image: ImageOps.expand(image, (0, 30), "black"))
    _change(second, lambda image: ImageOps.expand(image, 12, "white"))
    assert _found(folder, name)["framed"] == [(first.name,), (second.name,)]


@pytest.mark.parametrize("name", NOUNS)
def test_a_watermark_in_all_photos_is_found(name, tmp_path):
    folder = _example(name, tmp_path)

    def marked(image: Image.Image) -> Image.Image:
        drawn = Image.new("RGBA", image.size)
        font = ImageFont.load_default(size=14)
        ImageDraw.Draw(drawn).text((130, 234), "© J. Doe Photo", (255, 255, 255, 130), font)
        return Image.alpha_composite(image.convert("RGBA"), drawn).convert("RGB")

    paths = sorted(folder.glob("*.jpg"))
    for path in paths:
        _change(path, marked)
    assert _found(folder, name) == {"overlay": [tuple(path.name for path in paths)]}


def test_one_background_everywhere_is_found(tmp_path):
    folder = _example("cupcake", tmp_path)
    paths = sorted(folder.glob("*.jpg"))
    for turn, path in enumerate(paths):
        grey = Image.new("RGB", (256, 256), (120, 130, 125))
        sprite = Image.open(example_photos("cupcake") / path.name).resize((150, 150))
        grey.paste(sprite, (30 + 10 * turn, 80 - 10 * turn))
        grey.save(path)
    kinds = _found(folder, "cupcake")
    assert kinds["one ground"] == [tuple(path.name for path in paths)]


@pytest.mark.parametrize("name", NOUNS)
def test_near_duplicates_are_found(name, tmp_path):
    folder = _example(name, tmp_path)
    image = Image.open(folder / f"{name}_4.jpg")
    copies = {
        "a_resized": image.resize((140, 140)),
        "b_cut": _cut(image, 0.04, 0.03, 0.03, 0.04),
        "c_cut_at_one_side": _cut(image, 0.05, 0, 0, 0.02),
        "d_brighter": ImageEnhance.Brightness(image).enhance(1.08),
        "e_flatter": ImageEnhance.Contrast(image).enhance(0.85),
    }
    for stem, copy in copies.items():
        copy.save(folder / f"{stem}.jpg", quality=60)
    expected = sorted([*(f"{stem}.jpg" for stem in copies), f"{name}_4.jpg"])
    assert _found(folder, name)["alike"] == [tuple(expected)]


def test_three_copies_are_one_finding(tmp_path):
    folder = _example("chelsea", tmp_path)
    for number in (7, 8):
        image = Image.open(folder / "chelsea_1.jpg").resize((30 * number, 30 * number))
        image.save(folder / f"chelsea_{number}.jpg")
    expected = ("chelsea_1.jpg", "chelsea_7.jpg", "chelsea_8.jpg")
    assert _found(folder, "chelsea")["alike"] == [expected]


def test_different_drawings_on_white_are_not_alike(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(12):
        image = Image.new("RGB", (256, 256), "white")
        draw, points = ImageDraw.Draw(image), rng.integers(60, 196, (5, 2)).tolist()
        lines = [tuple(point) for point in points]
        if number % 2:
            draw.line(lines, fill="black", width=3)
        else:
            draw.polygon(lines, fill="navy")
        image.save(tmp_path / f"{number}.png")
    kinds = _found(tmp_path, "robot")
    assert "one ground" in kinds and "alike" not in kinds


def _with_captions(tmp_path: Path, *captions: str) -> dict[str, list[tuple[str, ...]]]:
    folder = _example("robot", tmp_path)
    for path in folder.glob("*.txt"):
        path.unlink()
    for number, text in enumerate(captions, 1):
        (folder / f"robot_{number}.txt").write_text(text)
    return _found(folder, "robot")


GROUNDS = ("purple", "pink", "yellow", "black", "red", "gray")


def test_captions_that_describe_the_concept_are_named(tmp_path):
    captions = [f"a <robot> on a {colour} background" for colour in GROUNDS]
    captions[1] = "a shiny blue <robot> on a pink background"
    captions[3] = "a <robot> robot with round eyes on a black background"
    kinds = _with_captions(tmp_path, *captions)
    assert kinds == {"describes": [("robot_2.jpg",), ("robot_4.jpg",)]}


def test_missing_captions_are_named_where_others_have_one(tmp_path):
    kinds = _with_captions(tmp_path, *[f"a <robot> on {colour}" for colour in GROUNDS[:4]])
    assert kinds == {"no caption": [("robot_5.jpg", "robot_6.jpg")]}
    assert _with_captions(tmp_path / "none") == {}


def test_captions_that_are_all_the_same_or_share_a_word_are_named(tmp_path):
    same = _with_captions(tmp_path / "a", *["a photo of <robot>"] * 4, "<robot>, left", "<robot> 2")
    assert same == {"same words": [tuple(f"robot_{number}.jpg" for number in range(1, 5))]}
    shared = [f"a <robot> with antennas on a {colour} background" for colour in GROUNDS]
    every = tuple(f"robot_{number}.jpg" for number in range(1, 7))
    assert _with_captions(tmp_path / "b", *shared) == {"same words": [every]}


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("a fluffy brown <rex> dog with floppy ears on a red rug", ["fluffy brown", "floppy ears"]),
        ("<REX>, a black dog, in the snow", ["black"]),
        ("a small <rex> on an orange background", []),
        ("a close-up photo of <rex>, one eye and one ear", []),
        ("<rex> on a brown sofa beside a red ball", []),
        ("a <rex> dog in a green field", []),
    ],
)
def test_words_that_describe_the_concept(caption, words):
    assert concept_words(caption, Concept("<rex>", "dog")) == words
