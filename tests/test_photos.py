import io
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFile
from PIL.PngImagePlugin import PngInfo

from rite_diffusion.config import AugmentSection
from rite_diffusion.errors import PhotoFolderError
from rite_diffusion.photos.buckets import batch_indices, bucket_of, bucket_of_step, bucket_sizes
from rite_diffusion.photos.dataset import Encoding, encode_photos
from rite_diffusion.photos.folder import read_folder
from rite_diffusion.photos.images import UnreadableImage, fit, open_image, to_image, to_tensor
from rite_diffusion.seeding import generator
from rite_diffusion.types import Concept

CONCEPT = Concept("<thing>", "toy")
TEMPLATES = ["a {trigger}", "a photo of a {trigger}, a {class_noun}"]


def test_captions_come_from_files_then_templates(photos):
    found = read_folder(photos, CONCEPT, TEMPLATES)
    assert [photo.caption for photo in found.photos] == [
        "a <thing> on a red background",
        "a <thing> on a green background",
        "a <thing>",
    ]
    assert found.captioned == 2 and found.skipped == []
    assert found.sizes() == "80x70 to 100x70"


def test_files_that_are_not_pictures_are_skipped_with_a_reason(photos):
    (photos / "broken.jpg").write_bytes(b"not a picture")
    (photos / "empty.png").write_bytes(b"")
    (photos / "notes.pdf").write_bytes(b"%PDF")
    whole = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (90, 90, 3), np.uint8)
    Image.fromarray(noise).save(whole, "JPEG")
    (photos / "cut.jpg").write_bytes(whole.getvalue()[:2000])
    found = read_folder(photos, CONCEPT, TEMPLATES)
    reasons = {path.name: reason for path, reason in found.skipped}
    assert len(found.photos) == 3
    assert reasons["broken.jpg"] == reasons["empty.png"] == "not a picture"
    assert reasons["notes.pdf"] == "not a picture file"
    assert reasons["cut.jpg"].startswith("damaged")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: None, "does not exist"),
        (lambda folder: folder.write_text("x"), "is a file"),
        (lambda folder: folder.mkdir(), "no images"),
        (lambda folder: (folder / "dog").mkdir(parents=True), "holds the folders dog"),
        (
            lambda folder: (folder.mkdir(), (folder / "a.jpg").write_text("x")),
            "no usable image in .*a.jpg: not a picture",
        ),
    ],
)
def test_unusable_photo_folders_are_refused(tmp_path, make, words):
    make(tmp_path / "photos")
    with pytest.raises(PhotoFolderError, match=words):
        read_folder(tmp_path / "photos", CONCEPT, TEMPLATES)


def test_a_caption_in_another_encoding_is_named(photos):
    (photos / "2.txt").write_bytes("caf\xe9".encode("latin-1"))
    with pytest.raises(PhotoFolderError, match="2.txt is not UTF-8"):
        read_folder(photos, CONCEPT, TEMPLATES)


def test_kohyas_folders_repeat_their_pictures(photos, pocket):
    inner = photos / "3_thing toy"
    inner.mkdir()
    for path in photos.glob("?.*"):
        path.rename(inner / path.name)
    found = read_folder(photos, CONCEPT, TEMPLATES)
    assert [(p.path.name, p.repeats) for p in found.photos] == [(f"{i}.png", 3) for i in range(3)]
    assert found.captioned == 2 and found.repeats() == [("3_thing toy", 3, 3)]
    data = encode_photos(pocket, found.photos, Encoding(64, augment=AugmentSection(flip=True)))
    assert len(data.latents) == 6 and data.latents[0].shape == (8, 16, 16)
    assert data.names.count("2.png") == 6 and data.samples[-6:] == [4, 5] * 3


def test_captions_are_read_from_metadata_jsonl(photos):
    rows = [{"file_name": "2.png", "text": "the {trigger}"}, {"file_name": "gone.png"}]
    (photos / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = read_folder(photos, CONCEPT, TEMPLATES)
    assert found.photos[2].caption == "the <thing>" and found.captioned == 3
    assert found.skipped == [
        (photos / "gone.png", "not there, but named in metadata.jsonl, line 2")
    ]
    (photos / "metadata.jsonl").write_text("[1]\n")
    with pytest.raises(PhotoFolderError, match="metadata.jsonl, line 1"):
        read_folder(photos, CONCEPT, TEMPLATES)


def test_masks_come_from_files_or_from_transparency(photos, pocket):
    half = Image.new("L", (80, 70), 0)
    half.paste(255, (0, 0, 40, 70))
    half.save(photos / "0-masklabel.png")
    (photos / "masks").mkdir()
    Image.new("L", (45, 35), 255).save(photos / "masks/1.png")
    clear = Image.new("RGBA", (64, 64), (200, 30, 30, 255))
    clear.putpixel((0, 0), (0, 0, 0, 0))
    clear.save(photos / "3.png")
    found = read_folder(photos, CONCEPT, TEMPLATES).photos
    assert [photo.path.name for photo in found] == ["0.png", "1.png", "2.png", "3.png"]
    assert [photo.mask and photo.mask.size for photo in found] == [
        (80, 70), (90, 70), None, (64, 64),
    ]  # fmt: skip
    data = encode_photos(pocket, found, Encoding(64))
    assert [mask.shape for mask in data.masks] == [(1, 16, 16)] * 4
    assert data.masks[0][0, 8, 0] == 1 and data.masks[0][0, 8, 15] == 0
    assert data.masks[2].min() == 1


def test_strips_tiny_pictures_and_outside_links_are_skipped(photos, tmp_path):
    Image.new("RGB", (3000, 20)).save(photos / "strip.png")
    Image.new("RGB", (9, 9)).save(photos / "speck.png")
    Image.new("RGB", (64, 64)).save(tmp_path / "outside.png")
    (photos / "link.png").symlink_to(tmp_path / "outside.png")
    (photos / "loop.png").symlink_to(photos / "loop.png")
    (photos / "10_loop").symlink_to(photos)
    found = read_folder(photos, CONCEPT, TEMPLATES)
    reasons = {path.name: reason for path, reason in found.skipped}
    assert len(found.photos) == 3
    assert "strip" in reasons["strip.png"] and "too small" in reasons["speck.png"]
    assert reasons["link.png"] == "a link to outside the folder"


def test_small_pictures_are_named(tmp_path):
    Image.new("RGB", (90, 90)).save(tmp_path / "a.png")
    Image.new("RGB", (70, 72)).save(tmp_path / "b.jpg")
    assert read_folder(tmp_path, CONCEPT, TEMPLATES).smaller_than(80) == ["b.jpg"]


def _saved(tmp_path, image, name, **options):
    image.save(tmp_path / name, **options)
    return open_image(tmp_path / name)


def test_pictures_of_every_mode_open_as_rgb(tmp_path):
    red = Image.new("RGB", (8, 8), (200, 30, 30))
    assert _saved(tmp_path, red.convert("CMYK"), "a.jpg").getpixel((4, 4))[0] > 150
    assert _saved(tmp_path, red.quantize(4), "b.png").getpixel((4, 4)) == (200, 30, 30)
    clear = Image.new("RGBA", (8, 8), (200, 30, 30, 0))
    assert _saved(tmp_path, clear, "c.png").getpixel((4, 4)) == (255, 255, 255)
    deep = Image.fromarray(np.full((8, 8), 32768, np.uint16))
    assert _saved(tmp_path, deep, "d.png").getpixel((4, 4)) == (128, 128, 128)
    grey = Image.new("L", (8, 8), 77)
    assert _saved(tmp_path, grey, "e.png").getpixel((4, 4)) == (77, 77, 77)
    half = Image.merge("LA", (grey, Image.new("L", (8, 8), 51)))  # a fifth of it, on white
    assert _saved(tmp_path, half, "f.png").getpixel((4, 4)) == (219, 219, 219)


@pytest.mark.parametrize("suffix", ["gif", "png", "webp"])
def test_the_first_frame_of_an_animation_is_used(tmp_path, suffix):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "green")]
    options = {"save_all": True, "append_images": frames[1:], "lossless": True}
    image = _saved(tmp_path, frames[0], f"a.{suffix}", **options)
    assert image.mode == "RGB" and image.getpixel((4, 4)) == (255, 0, 0)


def test_an_empty_caption_file_gives_the_template(photos):
    (photos / "0.txt").write_text(" \n")
    (photos / "1.txt").write_bytes(b"")
    found = read_folder(photos, CONCEPT, TEMPLATES)
    assert [photo.caption for photo in found.photos] == [
        "a <thing>", "a photo of a <thing>, a toy", "a <thing>",
    ]  # fmt: skip
    assert found.captioned == 0


def test_exif_orientation_is_applied_once(tmp_path):
    image = Image.new("RGB", (20, 10), "black")
    exif = Image.Exif()
    exif[0x0112] = 6
    assert _saved(tmp_path, image, "a.jpg", exif=exif).size == (10, 20)


def test_a_decompression_bomb_is_refused_before_decoding(tmp_path, monkeypatch):
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("decoded"))
    with pytest.raises(UnreadableImage, match="too large"):
        open_image(tmp_path / "bomb.png")


def test_pixels_round_trip():
    array = np.random.default_rng(0).integers(0, 256, (8, 6, 3), np.uint8)
    image = Image.fromarray(array)
    assert np.array_equal(np.asarray(to_image(to_tensor(image))), array)


@given(
    count=st.integers(1, 30),
    batch=st.integers(1, 20),
    seed=st.integers(0, 9),
    steps=st.integers(1, 9),
)
def test_order_visits_every_photo_once_an_epoch(count, batch, seed, steps):
    order = [
        i for step in range(steps) for i in batch_indices([list(range(count))], batch, seed, step)
    ]
    for start in range(0, len(order) - count + 1, count):
        assert sorted(order[start : start + count]) == list(range(count))


def test_order_and_noise_depend_on_their_keys_alone():
    assert batch_indices([[0, 1, 2, 3, 4]], 3, 1, 40) == batch_indices([[0, 1, 2, 3, 4]], 3, 1, 40)
    draw = lambda *keys: torch.randn(4, generator=generator(*keys))  # noqa: E731
    assert torch.equal(draw(1, 2, 3), draw(1, 2, 3))
    assert not torch.equal(draw(1, 2, 3), draw(1, 3, 2))


def test_flipped_latents_are_those_of_the_mirrored_picture(pocket, photos):
    found = read_folder(photos, CONCEPT, TEMPLATES).photos
    data = encode_photos(pocket, found, Encoding(64, augment=AugmentSection(flip=True)))
    assert len(data.latents) == len(data.captions) == 6
    assert data.captions[0] == data.captions[1]
    mirrored = to_tensor(fit(found[2].image, 64, 64)).flip(-1)
    torch.testing.assert_close(data.latents[5], pocket.encode_images(mirrored[None])[0])


@given(resolution=st.integers(2, 64).map(lambda n: 16 * n), multiple=st.sampled_from([8, 16, 64]))
def test_buckets_fit_the_area_and_the_grid(resolution, multiple):
    sizes = bucket_sizes(resolution, multiple)
    assert all(w % multiple == 0 == h % multiple for w, h in sizes)
    assert all(w * h <= resolution**2 and max(w, h) <= 2 * min(w, h) for w, h in sizes)
    assert {(h, w) for w, h in sizes if (w + multiple) * h > resolution**2} <= set(sizes)
    if resolution % multiple == 0:
        assert (resolution, resolution) in sizes


@given(width=st.integers(16, 4000), height=st.integers(16, 4000))
def test_a_picture_goes_to_the_nearest_shape(width, height):
    sizes = bucket_sizes(512, 64)
    chosen = bucket_of((width, height), sizes)
    distance = {s: abs(np.log(s[0] / s[1] * height / width)) for s in sizes}
    assert distance[chosen] <= min(distance.values()) + 1e-5


@given(
    counts=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    batch=st.integers(1, 5),
    seed=st.integers(0, 5),
)
def test_buckets_and_samples_are_used_in_proportion(counts, batch, seed):
    samples = iter(range(sum(counts)))
    buckets = [[next(samples) for _ in range(count)] for count in counts]
    total = sum(counts)
    turns = [bucket_of_step(counts, seed, step) for step in range(3 * total)]
    for bucket, count in enumerate(counts):
        assert [turn for b, turn in turns if b == bucket] == list(range(3 * count))
    shown = [i for step in range(total) for i in batch_indices(buckets, batch, seed, step)]
    assert sorted(shown) == sorted(list(range(total)) * batch)
    for step in range(total):
        chosen = batch_indices(buckets, batch, seed, step)
        assert any(set(chosen) <= set(members) for members in buckets)


def test_photos_keep_their_shape_in_buckets(tmp_path, pocket):
    for name, size in (("wide", (300, 160)), ("tall", (100, 190)), ("square", (90, 91))):
        Image.new("RGB", size, "red").save(tmp_path / f"{name}.png")
    found = read_folder(tmp_path, CONCEPT, TEMPLATES).photos
    data = encode_photos(pocket, found, Encoding(64, bucketed=True))
    assert [latents.shape for latents in data.latents] == [(8, 16, 16), (8, 20, 12), (8, 12, 20)]
    assert data.buckets == [[0], [1], [2]]


def test_more_broken_pictures_than_whole_ones_are_refused(photos):
    for index in range(3):
        (photos / f"broken{index}.jpg").write_text("x")
    assert len(read_folder(photos, CONCEPT, TEMPLATES).skipped) == 3
    (photos / "broken3.jpg").write_text("x")
    with pytest.raises(PhotoFolderError, match="broken0.jpg: not a picture.*take the broken ones"):
        read_folder(photos, CONCEPT, TEMPLATES)


def test_a_text_bomb_in_a_png_is_skipped(photos):
    info = PngInfo()
    info.add_text("a", "x" * 80_000_000, zip=True)
    Image.new("RGB", (64, 64)).save(photos / "bomb.png", pnginfo=info)
    assert (photos / "bomb.png").stat().st_size < 200_000
    found = read_folder(photos, CONCEPT, TEMPLATES)
    assert [path.name for path, _ in found.skipped] == ["bomb.png"]


def test_unusual_names_are_kept_and_link_loops_end(photos):
    odd = ["猫 é.png", "line\nbreak.png", "..dots..png", "0.PNG"]
    for name in odd:
        Image.new("RGB", (64, 64)).save(photos / name, "PNG")
    (photos / "3_loop").symlink_to(photos)
    (photos / "self.png").symlink_to(photos / "self.png")
    found = read_folder(photos, CONCEPT, TEMPLATES)
    names = {photo.path.name for photo in found.photos}
    assert names == {"0.png", "1.png", "2.png", *odd} - {"..dots..png"}
    assert all(photo.path.parent == photos for photo in found.photos)
