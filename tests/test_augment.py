import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from rite_diffusion.config import AugmentSection
from rite_diffusion.files.writing import cache_folder
from rite_diffusion.photos.augment import views_of
from rite_diffusion.photos.dataset import Encoding, balanced, encode_photos
from rite_diffusion.photos.images import to_tensor
from rite_diffusion.photos.measures import measure
from rite_diffusion.types import Photo

SIZE = (64, 64)


@pytest.fixture
def photo(tmp_path):
    """A picture whose every row and column differs, masked on the left."""
    ramp = np.linspace(0, 255, 96, dtype=np.uint8)
    pixels = np.stack(np.broadcast_arrays(ramp[None], ramp[:, None], np.uint8(90)), axis=-1)
    mask = Image.new("L", (96, 96), 0)
    mask.paste(255, (0, 0, 48, 96))
    pair = (Image.fromarray(pixels), mask)
    return Photo(
        tmp_path / "a.png", (96, 96), "a <t>", lambda: pair, "", measure(pair[0]), white=0.5
    )


def _pixels(view):
    return np.asarray(view.image, np.float32)


def test_the_first_view_is_the_photo_and_the_others_are_random(photo):
    augment = AugmentSection(views=4, crop=0.3, colour=0.3)
    plain, *others = views_of(photo, SIZE, augment, seed=0, index=0)
    assert (_pixels(plain) == np.asarray(photo.image.resize(SIZE, 1))).all()
    assert len({_pixels(view).tobytes() for view in (plain, *others)}) == 4
    again = views_of(photo, SIZE, augment, seed=0, index=0)
    elsewhere = views_of(photo, SIZE, augment, seed=0, index=1)
    assert [v.image.tobytes() for v in again[1:]] == [v.image.tobytes() for v in others]
    assert not {v.image.tobytes() for v in elsewhere[1:]} & {v.image.tobytes() for v in others}


def test_a_random_crop_keeps_its_minimum_side_and_its_mask(photo):
    augment = AugmentSection(views=40, crop=0.25)
    for view in views_of(photo, SIZE, augment, seed=3, index=0)[1:]:
        red = _pixels(view)[:, :, 0]
        assert red.min() <= 0.27 * 255 and red.max() >= 0.73 * 255
        masked, middle = np.asarray(view.mask) > 127, red < 127.5
        assert (masked == middle).mean() > 0.95  # the mask's edge stays at the picture's middle


def test_colours_change_within_their_bounds(photo):
    views = views_of(photo, SIZE, AugmentSection(views=20, colour=0.2), seed=0, index=0)
    means = [_pixels(view).mean() / _pixels(views[0]).mean() for view in views[1:]]
    assert all(0.79 < mean < 1.21 for mean in means) and max(means) - min(means) > 0.1


def test_scaled_views_have_captions_and_ignore_the_padding(photo):
    augment = AugmentSection(views=60, scale_and_prefix=True)
    views = views_of(photo, SIZE, augment, seed=0, index=0)
    shares = [(np.asarray(view.valid) > 127).mean() for view in views[1:]]
    for view, share in zip(views[1:], shares, strict=True):
        small = share < 0.6**2 - 0.02
        assert ("very small" in view.caption or "far away" in view.caption) == small
        assert view.caption.startswith("a <t>")
        if share < 0.95:
            assert np.ptp(_pixels(view)[0]) == 0  # grey above the photo
    said = {view.caption for view in views}
    assert said == {"a <t>"} | {
        f"a <t>, {words}" for words in ("very small", "far away", "zoomed in", "close up")
    }
    assert 0.14 < min(shares) < 0.25


def test_every_view_is_mirrored_with_its_mask(photo):
    views = views_of(photo, SIZE, AugmentSection(views=2, crop=0.2, flip=True), seed=0, index=0)
    assert len(views) == 4
    for view, mirrored in zip(views[::2], views[1::2], strict=True):
        assert torch.equal(to_tensor(view.image).flip(-1), to_tensor(mirrored.image))
        assert (np.asarray(view.mask)[:, ::-1] == np.asarray(mirrored.mask)).all()


def test_padding_has_weight_0_and_masked_cells_the_floor(photo, pocket):
    augment = AugmentSection(views=30, scale_and_prefix=True)
    data = encode_photos(pocket, [photo], Encoding(64, augment=augment, mask_floor=0.25))
    assert data.masks[0].min() == 0.25 and data.masks[0].max() == 1
    smallest = min(data.masks, key=lambda mask: mask.sum())
    assert smallest[0, 0, 0] == 0 and smallest[0, 8, 4:8].max() > 0.9


def test_smaller_groups_are_repeated_to_balance(photo):
    groups = [[photo] * 2, [photo] * 10, [photo] * 3]
    found = balanced(groups)
    assert [each.repeats for each in found] == [5] * 2 + [1] * 10 + [3] * 3


def test_latents_are_cached_until_a_photo_changes(photo, pocket, monkeypatch):
    encoded = []
    encode = pocket.encode_images
    monkeypatch.setattr(pocket, "encode_images", lambda p: encoded.append(len(p)) or encode(p))
    how = Encoding(64, augment=AugmentSection(flip=True), cache=cache_folder() / "latents")
    first = encode_photos(pocket, [photo], how)
    again = encode_photos(pocket, [photo], how)
    assert encoded == [2]
    assert all(map(torch.equal, first.latents, again.latents))
    photo.image.putpixel((40, 40), (255, 255, 255))
    edited = encode_photos(pocket, [photo], how)
    assert encoded == [2, 2] and not torch.equal(first.latents[0], edited.latents[0])


def test_a_damaged_latent_cache_entry_is_replaced(photo, pocket):
    how = Encoding(64, cache=cache_folder() / "latents")
    first = encode_photos(pocket, [photo], how)
    [entry] = cache_folder().rglob("*.safetensors")
    entry.write_bytes(entry.read_bytes()[:100])
    again = encode_photos(pocket, [photo], how)
    assert torch.equal(first.latents[0], again.latents[0])
    assert torch.equal(load_file(entry)["latents"][0], first.latents[0])
