"""Pixel values of every mode, number type and colour profile, against literal ones."""

import sys

import numpy as np
import pytest
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from profiles import DISPLAY_P3, SRGB, WHITE, converted, grey_profile, matrix_profile, srgb_of
from rite_diffusion.photos import images
from rite_diffusion.photos.images import UnreadableImage, open_image


def _pixel(tmp_path, image, name, **options):
    image.save(tmp_path / name, **options)
    return open_image(tmp_path / name).getpixel((4, 4))


def _filled(value, dtype):
    return Image.fromarray(np.full((8, 8), value, dtype))


@pytest.mark.parametrize(
    ("image", "name", "expected"),
    [
        (_filled(0.5, np.float32), "a.tif", 128),  # in 0..1: 127.5
        (_filled(1.0, np.float32), "a.tif", 255),
        (_filled(1.25, np.float32), "a.tif", 255),  # overshoot of a resampled picture
        (_filled(-0.25, np.float32), "a.tif", 0),
        (_filled(200.0, np.float32), "a.tif", 200),  # in 0..255
        (_filled(32896.0, np.float32), "a.tif", 128),  # in 0..65535
        (_filled(0, np.uint16), "a.png", 0),
        (_filled(32768, np.uint16), "a.png", 128),  # 127.502
        (_filled(65535, np.uint16), "a.png", 255),
        (_filled(200, np.uint16), "a.png", 200),  # 8-bit values in 16 bits
        (_filled(25700, np.uint16), "a.tif", 100),
        (_filled(25700, np.int32), "a.tif", 100),
        (_filled(2**31 - 1, np.int32), "a.tif", 255),
        (_filled(77, np.uint8), "a.png", 77),
        (Image.new("1", (8, 8), 1), "a.png", 255),
        (Image.new("1", (8, 8), 0), "a.tif", 0),
        (Image.new("LA", (8, 8), (77, 51)), "a.png", 219),  # a fifth of 77 on white: 219.4
    ],
)
def test_grey_pictures_of_every_type_are_read(tmp_path, image, name, expected):
    assert _pixel(tmp_path, image, name) == (expected,) * 3


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_pixels_that_are_not_finite_are_refused(tmp_path, value):
    _filled(value, np.float32).save(tmp_path / "a.tif")
    with pytest.raises(UnreadableImage, match="no numbers"):
        open_image(tmp_path / "a.tif")


def test_sixteen_bit_pictures_of_both_byte_orders_are_read(tmp_path):
    values = np.full((8, 8), 25700, ">u2")
    tags = ImageFileDirectory_v2(prefix=b"MM")
    Image.fromarray(values).save(tmp_path / "big.tif", tiffinfo=tags)
    assert open_image(tmp_path / "big.tif").getpixel((4, 4)) == (100, 100, 100)


def test_one_transparent_grey_of_sixteen_bits_lies_on_white(tmp_path):
    values = np.full((8, 8), 25700, np.uint16)
    values[:, 4:] = 7
    Image.fromarray(values).save(tmp_path / "a.png", transparency=7)
    found = open_image(tmp_path / "a.png")
    assert found.getpixel((0, 0)) == (100, 100, 100) and found.getpixel((7, 7)) == (255, 255, 255)


def test_palette_cmyk_and_lab_pictures_are_read(tmp_path):
    red = Image.new("RGB", (8, 8), (200, 30, 30))
    assert _pixel(tmp_path, red.quantize(4), "a.png") == (200, 30, 30)
    assert _pixel(tmp_path, red.quantize(4), "a.gif") == (200, 30, 30)
    clear = red.quantize(4)
    assert _pixel(tmp_path, clear, "b.png", transparency=clear.getpixel((4, 4))) == (255,) * 3
    inks = Image.new("CMYK", (8, 8), (0, 217, 217, 55))  # (255 - 217) * (255 - 55) / 255 = 29.8
    assert _pixel(tmp_path, inks, "a.tif") == pytest.approx((200, 30, 30), abs=1)
    assert _pixel(tmp_path, inks, "a.jpg", quality=100) == pytest.approx((200, 30, 30), abs=2)
    lightness, a, b = 60.0, 30, 20  # of CIE Lab at D50, all in its upper branch
    y = (lightness + 16) / 116
    light = np.array([y + a / 500, y, y - b / 200]) ** 3 * WHITE
    lab = Image.new("LAB", (8, 8), (round(lightness * 2.55), 128 + a, 128 + b))
    expected = srgb_of(np.linalg.solve(SRGB, light))
    assert _pixel(tmp_path, lab, "b.tif") == pytest.approx(expected, abs=1.5)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.jpg", "a.webp", "a.avif"])
def test_a_wide_gamut_is_converted_to_srgb(tmp_path, name):
    colour, profile = (200, 90, 60), matrix_profile(DISPLAY_P3, 2.2)
    expected = converted(colour, DISPLAY_P3, 2.2)
    assert expected[0] - colour[0] > 12  # what ignoring the profile would miss
    options = {"quality": 100} | ({"lossless": True} if name == "a.webp" else {})
    found = _pixel(tmp_path, Image.new("RGB", (8, 8), colour), name, icc_profile=profile, **options)
    assert found == pytest.approx(expected, abs=4 if name in ("a.jpg", "a.avif") else 1.5)


def test_icc_profiles_apply_to_grey_palette_and_transparent_pictures(tmp_path):
    grey = Image.new("L", (8, 8), 100)
    linear = np.array([(100 / 255) ** 1.8])
    found = _pixel(tmp_path, grey, "a.png", icc_profile=grey_profile(1.8))
    assert found == pytest.approx([float(srgb_of(linear)[0])] * 3, abs=1.5)
    wide, colour = matrix_profile(DISPLAY_P3, 2.2), (200, 90, 60)
    expected = converted(colour, DISPLAY_P3, 2.2)
    solid = Image.new("RGB", (8, 8), colour)
    assert _pixel(tmp_path, solid.quantize(2), "b.png", icc_profile=wide) == pytest.approx(
        expected, abs=1.5
    )
    half = solid.copy()
    half.putalpha(51)
    found = _pixel(tmp_path, half, "c.png", icc_profile=wide)
    assert found == pytest.approx(expected * 0.2 + 255 * 0.8, abs=1.5)
    # A grey picture with a profile of RGB, as scanners write it.
    neutral = converted((100, 100, 100), DISPLAY_P3, 2.2)
    assert _pixel(tmp_path, grey, "d.png", icc_profile=wide) == pytest.approx(neutral, abs=1.5)


@pytest.mark.parametrize(
    "profile", [b"x" * 200, grey_profile(1.8), matrix_profile(DISPLAY_P3, 2)[:150]]
)
def test_an_icc_profile_that_does_not_fit_is_ignored(tmp_path, profile):
    red = Image.new("RGB", (8, 8), (200, 30, 30))
    assert _pixel(tmp_path, red, "a.png", icc_profile=profile) == (200, 30, 30)


@pytest.mark.parametrize("suffix", ["jfif", "jpe", "avif", "apng"])
def test_less_usual_suffixes_are_pictures(tmp_path, suffix):
    formats = {"jfif": "JPEG", "jpe": "JPEG", "avif": "AVIF", "apng": "PNG"}
    path = tmp_path / f"a.{suffix}"
    Image.new("RGB", (16, 16), (200, 30, 30)).save(path, formats[suffix], quality=95)
    assert path.suffix in images.SUFFIXES
    assert open_image(path).getpixel((4, 4)) == pytest.approx((200, 30, 30), abs=4)


def test_heic_is_read_with_pillow_heif_and_refused_without(tmp_path, monkeypatch):
    heif = pytest.importorskip("pillow_heif")
    heif.register_heif_opener()
    red = Image.new("RGB", (64, 48), (200, 30, 30))
    exif = Image.Exif()
    exif[0x0112] = 6  # by convention HEIF is turned by its own means and EXIF repeats it
    red.save(tmp_path / "a.heic", "HEIF", quality=95, exif=exif)
    (tmp_path / "b.jpg").write_bytes((tmp_path / "a.heic").read_bytes())
    opened = open_image(tmp_path / "a.heic")
    assert opened.getpixel((4, 4)) == pytest.approx((200, 30, 30), abs=4)
    assert opened.size == Image.open(tmp_path / "a.heic").size
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    images._formats.cache_clear()
    try:
        for name in ("a.heic", "b.jpg"):
            with pytest.raises(UnreadableImage, match=r"pip install 'rite-diffusion\[heic\]'"):
                open_image(tmp_path / name)
    finally:
        images._formats.cache_clear()
