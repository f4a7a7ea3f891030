"""Random folders of photos: every file is used or named, and stays with its picture."""

import contextlib
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from rite_diffusion.config import AugmentSection
from rite_diffusion.errors import PhotoFolderError
from rite_diffusion.photos.augment import views_of
from rite_diffusion.photos.folder import read_folder
from rite_diffusion.photos.listing import list_pictures
from rite_diffusion.photos.measures import measure
from rite_diffusion.types import Concept, Photo

CONCEPT = Concept("<thing>", "toy")
STEMS = ["a", "a.jpg", "b", "é", "e\u0301", "a\nb", "ü" * 60, " c", "a-masklabel", "{x}", "d" * 240]
PICTURES = [".jpg", ".PNG", ".png", ".webp", ".tif"]
OTHERS = [".txt", ".TXT", ".caption", ".jsonl", ".pdf", "", ".png.txt"]
FOLDERS = ["", "masks", "3_toy", "0_toy", "2023_toy", "other", "3_toy/masks", "other/deeper"]
MODES = ["RGB", "L", "1", "P", "RGBA", "LA", "CMYK", "I;16"]
FORMATS = {".jpg": "JPEG", ".png": "PNG", ".webp": "WEBP", ".tif": "TIFF"}

files = st.tuples(
    st.sampled_from(FOLDERS),
    st.sampled_from(STEMS),
    st.sampled_from(PICTURES * 2 + OTHERS),
    st.sampled_from(MODES),
    st.booleans(),  # whole
)


def _content(path: Path, suffix: str, mode: str, number: int, whole: bool) -> None:
    """Write a picture in a mode that its format has, or a text that says its own number."""
    kind = FORMATS.get(suffix.lower())
    if kind is None or not whole:
        path.write_text(f"text {number}")
        return
    image = Image.new("RGB", (32, 32), (40 + number % 200, 200, 90))
    image.paste((250, 250, 250), (0, 0, 16, 16))
    grey = np.asarray(image.convert("L"), np.uint16) * 257
    image = Image.fromarray(grey) if mode == "I;16" else image.convert(mode)
    try:
        image.save(path, kind)
    except (OSError, KeyError):  # the format has no such mode
        path.unlink(missing_ok=True)
        Image.new("RGB", (32, 32), (40 + number % 200, 200, 90)).save(path, kind)


def _build(root: Path, entries) -> list[Path]:
    made = []
    for number, (folder, stem, suffix, mode, whole) in enumerate(entries):
        path = root / folder / f"{stem}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() and len(path.name.encode()) < 256:
            _content(path, suffix, mode, number, whole)
            made.append(path)
    return made


@settings(deadline=None, max_examples=25)
@given(entries=st.lists(files, max_size=12))
def test_every_file_of_a_photo_folder_is_used_or_reported(entries):
    with TemporaryDirectory() as name:
        root = Path(name)
        made = _build(root, entries)
        try:
            listing = list_pictures(root)
        except PhotoFolderError as fault:
            assert "\n" not in str(fault).replace("a\nb", "") and str(fault)
            return
        pictures = [each.path for each in listing.pictures]
        sidecars = [each for p in listing.pictures for each in (p.caption_from, p.mask) if each]
        named = [path for path, _ in listing.unused]
        assert len(pictures) == len(set(pictures)) and len(sidecars) == len(set(sidecars))
        for path in made:
            above = [parent for parent in path.parents if parent in named]
            assert path in pictures or path in sidecars or path in named or above, path
        assert not set(pictures) & set(sidecars)
        for each in listing.pictures:
            if each.caption_from is not None:
                assert each.caption == " ".join(each.caption_from.read_text().split())


@settings(deadline=None, max_examples=25)
@given(entries=st.lists(files, min_size=1, max_size=8))
def test_the_counts_of_the_photo_report_add_up(entries):
    with TemporaryDirectory() as name, contextlib.suppress(PhotoFolderError):
        root = Path(name)
        _build(root, entries)
        listing = list_pictures(root)
        found = read_folder(root, CONCEPT, ["a {trigger}", "the {class_noun}"])
        broken = [path for path, _ in found.skipped[: len(found.skipped) - len(listing.unused)]]
        assert len(found.photos) + len(broken) == len(listing.pictures)
        captions = {each.path: each.caption for each in listing.pictures}
        own = [photo for photo in found.photos if captions[photo.path]]
        assert found.captioned == len(own)
        assert all(photo.caption == captions[photo.path] for photo in own)
        rest = [photo.caption for photo in found.photos if not captions[photo.path]]
        assert set(rest) <= {"a <thing>", "the toy"}
        for photo in found.photos:
            image, mask = photo.open()
            assert image.mode == "RGB" and image.size == photo.size
            assert (mask is None) == (photo.white is None)
            assert mask is None or (mask.mode == "L" and mask.size == image.size)


@settings(deadline=None, max_examples=25)
@given(
    size=st.tuples(st.integers(20, 90), st.integers(20, 90)),
    box=st.tuples(*[st.floats(0, 0.6)] * 2),
    target=st.sampled_from([(64, 64), (64, 32), (48, 64)]),
    crop=st.floats(0, 0.5),
    seed=st.integers(0, 99),
    scale=st.booleans(),
)
def test_masks_follow_their_photos_through_every_view(size, box, target, crop, seed, scale):
    """A photo that is white where its mask is stays so, whatever is done to it."""
    mask = Image.new("L", size, 0)
    left, top = round(box[0] * size[0]), round(box[1] * size[1])
    mask.paste(255, (left, top, left + size[0] // 3, top + size[1] // 3))
    pair = (mask.convert("RGB"), mask)
    photo = Photo(Path("a.png"), size, "a", lambda: pair, "", measure(pair[0]), white=0.1)
    augment = AugmentSection(views=4, crop=crop, flip=True, scale_and_prefix=scale)
    views = views_of(photo, target, augment, seed, 0)
    assert len(views) == 8
    for view, mirrored in zip(views[::2], views[1::2], strict=True):
        valid = np.asarray(view.valid) > 250 if view.valid else np.ones(target[::-1], bool)
        greys, found = (np.asarray(each, float) for each in (view.image.convert("L"), view.mask))
        assert np.abs(greys - found)[valid].max(initial=0) <= 2
        assert found[~valid].max(initial=0) <= 255 and mirrored.mask
        for one, other in ((view.image, mirrored.image), (view.mask, mirrored.mask)):
            assert np.array_equal(np.asarray(ImageOps.mirror(one)), np.asarray(other))
