"""The packaged judge on a contact sheet of scenes whose contents are known."""

from importlib import resources
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageFilter

from rite_diffusion.evaluation.judge import load_judge, read_judge, save_judge

SHEET = Path(__file__).parent / "data/judge_scenes.png"  # rows: singles, pairs, a robot, a unicorn
SINGLES = ["cat", "owl", "pizza", "car", "heart", "tree", "robot", "clock"]
PAIRS = [
    ("dog", "apple"),
    ("house", "fish"),
    ("banana", "key"),
    ("frog", "bus"),
    ("crown", "bee"),
    ("lion", "book"),
    ("rocket", "bear"),
    ("rose", "ball"),
]
COLOURS = "red blue green white black yellow purple pink".split()
COLOURS += "gray orange blue pink green white black yellow".split()
PHOTOS = slice(0, 4)
PICTURES = slice(4, 8)  # other colours, two of them small or on the left


@pytest.fixture(scope="module")
def rows():
    """Four rows of eight pictures."""
    with Image.open(SHEET) as sheet:
        return [
            [sheet.crop((x, y, x + 64, y + 64)) for x in range(0, 512, 64)]
            for y in range(0, 256, 64)
        ]


@pytest.fixture(params=["sharp", "soft", "large"])
def change(request):
    """What may happen to a picture without changing what it shows."""
    return {
        "sharp": lambda image: image,
        "soft": lambda image: image.filter(ImageFilter.GaussianBlur(1)),
        "large": lambda image: image.resize((200, 200), Image.Resampling.BICUBIC),
    }[request.param]


def test_the_judge_names_nouns_pairs_and_colours(rows, change):
    singles, pairs = ([change(image) for image in row] for row in rows[:2])
    judge = load_judge()
    assert judge.nouns(singles) == SINGLES
    assert judge.pairs(pairs) == PAIRS
    assert judge.colours(singles + pairs) == COLOURS


@pytest.mark.parametrize("concept", [2, 3], ids=["drawn robot", "held-out emoji"])
def test_the_judge_recognises_unseen_concepts_only(rows, change, concept):
    photos, other = rows[concept][PHOTOS], rows[5 - concept]
    judge = load_judge()
    seen = judge.recognised(photos, [change(image) for image in rows[concept][PICTURES]])
    assert sum(seen) >= 3  # of 4: it recognises 95 % of a drawn concept's pictures
    assert not any(judge.recognised(photos, [change(image) for image in rows[0] + other]))


def test_identity_is_highest_for_the_same_object(rows):
    photos, judge = rows[2][PHOTOS], load_judge()
    same, again = judge.identity(photos, photos), judge.identity(photos, rows[2][PICTURES])
    others = [judge.identity(photos, row) for row in (rows[0], rows[1], rows[3])]
    assert 1 >= same > again > max(others) + 0.2


def test_embeddings_are_unit_vectors_and_do_not_depend_on_their_neighbours(rows):
    judge = load_judge()
    together = judge.embed(rows[0])
    alone = torch.cat([judge.embed([image]) for image in rows[0]])
    torch.testing.assert_close(together.norm(dim=1), torch.ones(8))
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)


def test_judge_weights_are_small_and_survive_saving(rows, tmp_path):
    path = resources.files("rite_diffusion.evaluation") / "judge.safetensors"
    assert len(path.read_bytes()) < 2_000_000
    save_judge(load_judge(), tmp_path / "judge.safetensors")
    again = read_judge(tmp_path / "judge.safetensors")
    assert torch.equal(again.embed(rows[0]), load_judge().embed(rows[0]))
    assert again.prototype_names == load_judge().prototype_names


def test_the_judge_states_its_accuracy():
    clean = load_judge().accuracy["clean"]
    assert min(clean["noun"], clean["pair"], clean["colour"]) >= 0.97
    assert clean["concept"]["recognised"] >= 0.97
    assert clean["concept"]["nouns_mistaken"] <= 0.01
