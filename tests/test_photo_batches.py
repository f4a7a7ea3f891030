"""From random folders to batches: each sample has the caption and the mask of its own picture."""

from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn import functional as F

from rite_diffusion.config import AugmentSection
from rite_diffusion.photos.dataset import Encoding, encode_photos
from rite_diffusion.photos.folder import read_folder
from rite_diffusion.training.batch import draw_batch
from rite_diffusion.types import Concept

CONCEPT = Concept("<thing>", "toy")
CELL = 8  # pixels of a latent cell
STEMS = ["a", "A b", "é", "a.b", "1", "x-mask-y", "(2)", "ü" * 20]
SIZES = [(64, 64), (96, 48), (40, 88)]
# What knows no model: latents are the pictures' own colours.
BASE = SimpleNamespace(
    multiple=16,
    device="cpu",
    triggers={"own": ["<thing>"]},
    token_budget=75,
    token_count=lambda text: len(text.split()),
    encode_images=lambda pixels: F.avg_pool2d(pixels, CELL),
)

pictures = st.tuples(
    st.sampled_from(["3_toy", "2_toy"]),  # in kohya's layout
    st.sampled_from(STEMS),
    st.sampled_from([".png", ".webp", ".tif"]),
    st.sampled_from(SIZES),
    st.sampled_from(["none", "text", "table"]),  # where the caption is
    st.sampled_from(["none", "masks", "beside"]),  # where the mask is
    st.integers(1, 8),  # EXIF orientation
)


def colour_of(number: int) -> tuple[int, int, int]:
    """A colour that tells a picture from all others."""
    return 10 + 20 * number, 250 - 20 * number, 90


def build(root: Path, entries, kohya: bool) -> dict[int, tuple[str, bool, int]]:
    """Write the folder; returns number of a picture -> its caption, whether masked, its repeats."""
    made, told = {}, {}
    for number, (folder, stem, suffix, size, caption, mask, turn) in enumerate(entries):
        home = root / folder if kohya else root
        path = home / f"{stem}{suffix}"
        if path.exists():
            continue
        home.mkdir(exist_ok=True)
        exif = Image.Exif()
        exif[0x0112] = turn
        options = {"lossless": True} if suffix == ".webp" else {}
        Image.new("RGB", size, colour_of(number)).save(path, exif=exif, **options)
        turned = size if turn < 5 else size[::-1]
        text = f"the <thing> of number {number}"
        if caption == "text":
            (home / f"{path.name}.txt").write_text(text)
        elif caption == "table":
            told.setdefault(home, []).append(f'{{"file_name": "{path.name}", "text": "{text}"}}\n')
        if mask != "none":
            half = Image.new("L", turned, 0)
            half.paste(255, (0, 0, turned[0], turned[1] // 2))
            (home / "masks").mkdir(exist_ok=True)
            name = f"masks/{path.name}.png" if mask == "masks" else f"{path.name}-masklabel.png"
            half.save(home / name)
        repeats = int(folder[0]) if kohya else 1
        made[number] = (text if caption != "none" else "a <thing>", mask != "none", repeats)
    for home, rows in told.items():
        (home / "metadata.jsonl").write_text("".join(rows))
    return made


def number_of(latents: torch.Tensor) -> int:
    """Which picture a sample's latents (3, h, w) show."""
    red, green, _ = ((latents.mean((1, 2)) + 1) * 127.5).tolist()
    number = round((red - 10) / 20)
    assert abs(red - colour_of(number)[0]) < 2 and abs(green - colour_of(number)[1]) < 2
    return number


@settings(deadline=None, max_examples=20)
@given(
    entries=st.lists(pictures, min_size=1, max_size=8),
    kohya=st.booleans(),
    bucketed=st.booleans(),
    flip=st.booleans(),
    views=st.integers(1, 2),
)
def test_batches_pair_each_picture_with_its_own_caption_and_mask(
    entries, kohya, bucketed, flip, views
):
    with TemporaryDirectory() as name:
        root = Path(name)
        made = build(root, entries, kohya)
        found = read_folder(root, CONCEPT, ["a {trigger}"])
        assert len(found.photos) == len(made) and not found.skipped
        augment = AugmentSection(views=views, flip=flip, crop=0.0, colour=0.0)
        data = encode_photos(BASE, found.photos, Encoding(64, bucketed, augment))
    seen = [number_of(data.latents[row]) for row in data.samples]
    each = views * (1 + flip)
    assert {n: seen.count(n) for n in seen} == {n: each * r for n, (_, _, r) in made.items()}
    for step in range(4):
        batch = draw_batch(BASE, data, step, size=3)
        for place, caption in enumerate(batch.captions):
            text, masked, _ = made[number_of(batch.latents[place])]
            assert caption == text
            if batch.masks is not None:
                mask = batch.masks[place, 0]
                assert torch.all(mask[0] == 1)
                assert bool((mask[-1] == 0).all()) == masked == bool((mask < 1).any())
            else:
                assert not masked
