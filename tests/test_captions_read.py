"""The triggers of a caption are among the tokens that the text encoder reads, whatever was done."""

import pytest
from PIL import Image

from rite_diffusion.backbones.learned_embeddings import tokens_of, vectors_in
from rite_diffusion.config import AugmentSection, CaptionSection
from rite_diffusion.methods import METHODS
from rite_diffusion.methods.triggers import with_trigger_kept
from rite_diffusion.photos.augment import views_of
from rite_diffusion.photos.measures import measure
from rite_diffusion.training.batch import draw_batch
from rite_diffusion.types import Photo
from wordy import random_data, wordy_config

SHUFFLED = CaptionSection(shuffle=True, keep=1)


def read_ids(backbone, caption):
    """What is left of a caption's tokens where the encoder stops."""
    ids, slots = tokens_of(backbone.tokenizer, caption, vectors_in([caption], backbone.embeddings))
    kept = ids[: backbone.token_budget]
    return kept, [slot.word for slot in slots if slot.position <= len(kept)]


def reads(backbone, caption, word):
    """Whether the tokens that are read spell a word."""
    return word in backbone.tokenizer.decode(read_ids(backbone, caption)[0]).replace(" ", "")


def batches(backbone, captions, count=12, how=SHUFFLED):
    data = random_data(backbone, captions, cells=(8, 8))
    for step in range(count):
        yield from draw_batch(backbone, data, step, size=len(captions), captions=how).captions


def test_a_shuffled_trigger_stays_within_the_token_limit(pocket):
    pocket.triggers["own"] = ["<thing>"]
    filler = ", ".join(f"on a very large {noun} of the sea" for noun in "red old big hot".split())
    caption = f"a toy, <thing>, {filler}"
    assert pocket.token_count(caption) > pocket.token_budget
    seen = set(batches(pocket, [caption]))
    assert len(seen) > 5  # they are shuffled indeed
    for text in seen:
        assert reads(pocket, text, "<thing>"), text
    del pocket.triggers["own"]
    assert not all(reads(pocket, t, "<thing>") for t in batches(pocket, [caption]))


def test_all_vectors_of_an_embedding_count_as_tokens(pocket):
    config = wordy_config("pivotal", tokens={"vectors": 9})
    filler = "on a red ground " * 20
    words = filler.split()[: pocket.token_budget - pocket.token_count("a <thing>")]
    caption = f"a {' '.join(words)} <thing>"
    assert pocket.token_count(caption) == pocket.token_budget  # it fits as the base alone reads it
    METHODS["pivotal"](pocket, config)
    assert pocket.token_count(caption) > pocket.token_budget
    for text in batches(pocket, [caption], 2, CaptionSection()):
        ids, slots = read_ids(pocket, text)
        assert len(ids) <= pocket.token_budget and slots.count("<thing>") == 9


@pytest.mark.parametrize("place", [0, 5, 200])
def test_every_trigger_of_a_caption_is_kept(pocket, place):
    words = ["very"] * 200
    words.insert(place, "<one>")
    caption = " ".join([*words, "<two>", "and", "<three>"])
    kept, lost = with_trigger_kept(pocket, caption, ["<one>", "<two>", "<three>", "<four>"])
    assert pocket.token_count(kept) <= pocket.token_budget
    assert all(reads(pocket, kept, word) for word in ("<one>", "<two>", "<three>"))
    assert set(lost.split(", ")) == {"<two>", "<three>"} | ({"<one>"} if place == 200 else set())
    short = "a <one> and a <two>"
    assert with_trigger_kept(pocket, short, ["<one>", "<two>"]) == (short, None)


def test_words_added_to_scaled_views_come_after_the_trigger(pocket, tmp_path):
    pocket.triggers["own"] = ["<thing>"]
    caption = "very " * (pocket.token_budget - pocket.token_count("<thing>")) + "<thing>"
    image = Image.new("RGB", (64, 64), "red")
    photo = Photo(
        tmp_path / "a.png", image.size, caption, lambda: (image, None), "", measure(image)
    )
    augment = AugmentSection(views=12, scale_and_prefix=True)
    told = {view.caption for view in views_of(photo, (64, 64), augment, 0, 0)}
    assert len(told) > 1
    for text in batches(pocket, sorted(told), 2, CaptionSection()):
        assert reads(pocket, text, "<thing>")
