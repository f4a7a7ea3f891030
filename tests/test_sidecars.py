"""Captions, masks and tables beside photos: each belongs to one picture, or is named."""

import gc
import json
import os
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from PIL import Image

from rite_diffusion.api.masks import mask_target
from rite_diffusion.errors import PhotoFolderError
from rite_diffusion.photos.folder import read_folder
from rite_diffusion.photos.listing import list_pictures
from rite_diffusion.types import Concept

CONCEPT = Concept("<thing>", "toy")


def _read(folder):
    return read_folder(folder, CONCEPT, ["a {trigger}"])


def _picture(path, size=(40, 30), colour="red", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)


def _reasons(found, folder):
    return {str(path.relative_to(folder)): reason for path, reason in found.skipped}


def _half(size=(40, 30), mode="L"):
    """Black on the left, white on the right."""
    mask = Image.new(mode, size, 0)
    mask.paste(Image.new(mode, size, "white" if mode != "1" else 1), (size[0] // 2, 0))
    return mask


def _grey(value):
    return Image.new("L", (40, 30), value)


def _mask(folder, name="a.jpg"):
    [photo] = [photo for photo in _read(folder).photos if photo.path.name == name]
    return np.asarray(photo.mask)


def test_with_clashing_stems_sidecars_need_full_names(tmp_path):
    for name in ("a.jpg", "a.png", "b.png"):
        _picture(tmp_path / name)
    (tmp_path / "a.txt").write_text("shared")
    (tmp_path / "a.jpg.txt").write_text("of the jpg")
    (tmp_path / "b.TXT").write_text("of b")
    (tmp_path / "b.caption").write_text("less")
    (tmp_path / "masks").mkdir()
    for name in ("a.png", "a.png.png", "gone.png"):
        _half().save(tmp_path / "masks" / name)
    found = _read(tmp_path)
    assert [photo.caption for photo in found.photos] == ["of the jpg", "a <thing>", "of b"]
    assert [photo.white for photo in found.photos] == [None, 0.5, None]
    assert _reasons(found, tmp_path) == {
        "a.txt": "a caption that a.jpg and a.png share: name it a.jpg.txt",
        "b.caption": "b.png has its caption from b.TXT",
        "masks/a.png": "a mask that a.jpg and a.png share: name it a.jpg.png",
        "masks/gone.png": "a mask of no picture here",
    }
    pictures = list_pictures(tmp_path).pictures
    targets = [mask_target(each, pictures).name for each in pictures]
    assert targets == ["a.jpg.png", "a.png.png", "b.png"]


def test_make_masks_writes_over_the_mask_that_is_used(tmp_path):
    _picture(tmp_path / "a.jpg")
    _half().save(tmp_path / "a-masklabel.png")
    [picture] = list_pictures(tmp_path).pictures
    assert mask_target(picture, [picture]) == tmp_path / "a-masklabel.png"


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_a_mask_of_unturned_pixels_is_turned_like_its_photo(tmp_path, orientation):
    stored = Image.new("RGB", (40, 30), "black")
    stored.paste("white", (20, 0, 40, 30))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    (tmp_path / "masks").mkdir()
    _half().save(tmp_path / "masks/a.png")  # white where the stored pixels are
    [photo] = _read(tmp_path).photos
    image, mask = photo.open()
    assert image.size == mask.size == (30, 40)
    assert np.array_equal(np.asarray(image.convert("L")), np.asarray(mask))
    _half((60, 80)).save(tmp_path / "masks/a.png")  # of the upright shape: stays as it is
    upright = np.asarray(_read(tmp_path).photos[0].mask)
    assert upright[:, :14].max() == 0 and upright[:, 16:].min() == 255


@pytest.mark.parametrize(
    ("mask", "name"),
    [
        (_half().point(lambda v: v // 255), "a.png"),  # labels 0 and 1
        (Image.fromarray((np.asarray(_half()) // 255).astype(np.uint16)), "a.png"),
        (Image.fromarray((np.asarray(_half()) // 255).astype(np.float32)), "a.tif"),
        (Image.fromarray(np.asarray(_half()).astype(np.uint16) * 257), "a.png"),
        (_half(mode="1"), "a.png"),
        (_half().convert("RGB").quantize(2), "a.png"),
        (Image.merge("RGB", [_half().point(lambda v: v // 2), *[_grey(0)] * 2]), "a.png"),
        (Image.merge("LA", [_grey(255), _half()]), "a.png"),  # white on a clear ground
        (Image.merge("LA", [_grey(0), _half()]), "a.png"),  # painted black
        (Image.merge("RGBA", [_grey(90), _grey(90), _grey(200), _half()]), "a.png"),  # cut out
        (Image.merge("LA", [_half(), _grey(254)]), "a.png"),
    ],
)  # fmt: skip
def test_masks_of_every_mode_become_black_and_white(tmp_path, mask, name):
    _picture(tmp_path / "a.jpg")
    (tmp_path / "masks").mkdir()
    mask.save(tmp_path / "masks" / name)
    found = _mask(tmp_path)
    assert found[:, :20].max() == 0 and found[:, 20:].min() >= 254


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (Image.new("L", (40, 30), 0), "masks/a.png is black"),
        (Image.fromarray((np.arange(1200) % 4).reshape(30, 40).astype(np.uint8)), "dark all over"),
        (Image.new("L", (30, 30), 255), "is 30x30, and its photo 40x30"),
        (Image.new("L", (30, 40), 255), "is 30x40, and its photo 40x30"),
        (b"no mask", "masks/a.png cannot be used: not a picture"),
        (b"", "masks/a.png cannot be used: not a picture"),
    ],
)
def test_an_unusable_mask_is_named_in_the_error(tmp_path, mask, words):
    _picture(tmp_path / "a.jpg")
    (tmp_path / "masks").mkdir()
    path = tmp_path / "masks/a.png"
    path.write_bytes(mask) if isinstance(mask, bytes) else mask.save(path)
    with pytest.raises(PhotoFolderError, match=words) as fault:
        _read(tmp_path)
    assert "\n" not in str(fault.value)


def test_a_photo_that_is_transparent_all_over_is_skipped(tmp_path):
    _picture(tmp_path / "a.jpg")
    Image.new("RGBA", (40, 30)).save(tmp_path / "b.png")
    assert _reasons(_read(tmp_path), tmp_path) == {"b.png": "transparent all over"}


def _table(folder, *lines):
    text = [
        line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines
    ]
    (folder / "metadata.jsonl").write_text("\n".join(text), encoding="utf-8")


def test_rows_of_a_table_find_their_pictures_and_captions(tmp_path):
    for name in ("a.png", "b.png", "c.png", "d.png", "train/x.png", "train/y.png", "other/z.png"):
        _picture(tmp_path / name)
    (tmp_path / "d.txt").write_text("from its file")
    _table(
        tmp_path,
        {"file_name": "./a.png", "prompt": "one\u2028line"},
        {"file_name": "b.png", "text": None, "caption": "a caption"},
        {"file_name": "c.png", "text": None},
        {"file_name": "train/x.png", "text": "in a {class_noun} folder"},
        {"file_name": "d.png", "text": "from the table"},
        {"file_name": "a.png", "text": "again"},
        {"file_name": "../e.png", "text": "outside"},
        {"file_name": "gone.png", "text": "gone"},
    )
    found = _read(tmp_path)
    assert {photo.path.name: photo.caption for photo in found.photos} == {
        "a.png": "one line",
        "b.png": "a caption",
        "c.png": "a <thing>",
        "d.png": "from its file",
        "x.png": "in a toy folder",
        "y.png": "a <thing>",
    }
    reasons = {path.name: reason for path, reason in found.skipped}
    assert reasons == {
        "a.png": "has its caption from another line than that of metadata.jsonl, line 6",
        "c.png": "named without a caption in metadata.jsonl, line 3",
        "d.png": "its caption in metadata.jsonl gives way to d.txt",
        "e.png": "leads out of the folder in metadata.jsonl, line 7",
        "gone.png": "not there, but named in metadata.jsonl, line 8",
        "other": "a folder, not looked into: pass it as the photo folder",
    }


@pytest.mark.parametrize(
    "line",
    ['{"file_name": "a.png", "text": ["x"]}', '{"file_name": "a.png", "text": 3}', "[1]", "null",
     '{"file_name": 3}', '{"text": "x"}', "{", "[" * 9999,
     '{"file_name": "a.png", "text": "\\ud800"}'],
)  # fmt: skip
def test_an_invalid_line_of_a_table_is_named(tmp_path, line):
    _picture(tmp_path / "a.png")
    _table(tmp_path, {"file_name": "a.png", "text": "x"}, line)
    with pytest.raises(PhotoFolderError, match="metadata.jsonl, line 2"):
        _read(tmp_path)


def test_numbered_folders_count_in_kohyas_layout_alone(tmp_path):
    beside = tmp_path / "beside"
    _picture(beside / "a.png")
    _picture(beside / "2023_summer/b.png")
    found = _read(beside)
    assert [(photo.path.name, photo.repeats) for photo in found.photos] == [("a.png", 1)]
    assert "a folder beside photos" in _reasons(found, beside)["2023_summer"]
    kohya = tmp_path / "kohya"
    for name in ("0_none", "1_few", "12_many"):
        _picture(kohya / name / "a.png")
    _picture(kohya / "12_many/deeper/b.png")
    found = _read(kohya)
    assert [photo.repeats for photo in found.photos] == [12, 1]
    assert found.repeats() == [("12_many", 1, 12)]
    assert set(_reasons(found, kohya)) == {"0_none", "12_many/deeper"}
    _picture(kohya / "2023_summer/a.png")
    with pytest.raises(PhotoFolderError, match="2,023 times an epoch.*Rename it"):
        _read(kohya)


def test_links_hidden_and_special_files_are_reported(tmp_path):
    folder = tmp_path / "photos"
    _picture(folder / "a.png")
    _picture(tmp_path / "outside/b.png")
    (folder / "b.png").symlink_to(tmp_path / "outside/b.png")
    (folder / "a.txt").symlink_to(tmp_path / "outside/none.txt")
    (folder / "5_x").symlink_to(tmp_path / "outside")
    (folder / "c.png").symlink_to(folder / "c.png")
    (folder / "masks").write_text("")
    os.mkfifo(folder / "d.png")
    (folder / ".e.png").write_text("")
    (folder / "captions.json").write_text("{}")
    (folder / ".DS_Store").write_text("")
    assert _reasons(_read(folder), folder) == {
        ".e.png": "hidden: its name begins with a dot",
        "5_x": "a link to a folder, not followed",
        "a.txt": "a link that leads nowhere",
        "b.png": "a link to outside the folder",
        "c.png": "a link that leads nowhere",
        "captions.json": "not read: captions come from metadata.jsonl alone",
        "d.png": "neither a file nor a folder",
        "masks": "a file, where a folder masks would hold masks",
    }


@contextmanager
def nobody():
    """Nobody's rights, where the tests run as root, whom no permission stops."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize(
    ("name", "words"),
    [("", "cannot read"), ("a.txt", "cannot read .*a.txt"), ("masks", "cannot read .*masks"),
     ("metadata.jsonl", "cannot read .*metadata.jsonl"), ("a.png", "a.png: cannot be read")],
)  # fmt: skip
def test_unreadable_files_are_an_error_of_one_line(open_folder, name, words):
    folder = open_folder / "photos"
    _picture(folder / "a.png")
    (folder / "a.txt").write_text("x")
    _table(folder, {"file_name": "a.png", "text": "x"})
    (folder / "masks").mkdir()
    (folder / name).chmod(0)
    with nobody(), pytest.raises(PhotoFolderError, match=words) as fault:
        _read(folder)
    assert "\n" not in str(fault.value)
    (folder / name).chmod(0o755)


@pytest.fixture
def open_folder():
    """A folder whose parents everyone may pass, unlike pytest's own."""
    with TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.mark.parametrize("path", ["x" * 300, "photos\0", "a/" * 3000])
def test_an_invalid_path_is_an_error_of_one_line(path, tmp_path):
    with pytest.raises(PhotoFolderError):
        _read(tmp_path / path)


def test_names_as_long_as_the_system_allows_have_captions_and_masks(tmp_path):
    stem = "x" * 251
    _picture(tmp_path / f"{stem}.png")
    (tmp_path / f"{stem}.txt").write_text("long")
    found = _read(tmp_path)
    assert [photo.caption for photo in found.photos] == ["long"]
    from rite_diffusion.api.masks import _write

    [picture] = list_pictures(tmp_path).pictures
    _write(mask_target(picture, [picture]), _half())
    assert _read(tmp_path).photos[0].white == 0.5


def test_no_picture_stays_in_memory_between_its_uses(tmp_path):
    for index in range(3):
        _picture(tmp_path / f"{index}.png", size=(1031, 777), colour=(index, 0, 0))
    found = _read(tmp_path)
    gc.collect()
    held = [each for each in gc.get_objects() if issubclass(type(each), Image.Image)]
    assert not [each for each in held if each.size == (1031, 777)]
    assert found.photos[2].image.getpixel((5, 5)) == (2, 0, 0)
    assert found.sizes() == "1031x777"


def test_a_photo_that_changes_after_the_report_is_noticed(tmp_path):
    _picture(tmp_path / "a.png")
    [photo] = _read(tmp_path).photos
    _picture(tmp_path / "a.png", size=(50, 50))
    with pytest.raises(PhotoFolderError, match="a.png or its mask has just changed"):
        photo.open()
    (tmp_path / "a.png").unlink()
    with pytest.raises(PhotoFolderError, match="cannot read .*a.png"):
        photo.open()


def test_unknown_placeholders_are_named_with_their_file(tmp_path):
    _picture(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a {Trigger} in {red|blue}")
    with pytest.raises(PhotoFolderError, match=r"a.txt: unknown placeholder \{Trigger\}"):
        _read(tmp_path)
    (tmp_path / "a.txt").write_text("a {trigger} in {red|blue} {")
    assert _read(tmp_path).photos[0].caption == "a <thing> in {red|blue} {"
