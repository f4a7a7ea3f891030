"""The packaged judge on a contact sheet of scenes whose contents are known."""

from importlib import resources
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageFilter
from safetensors import safe_open

from rite_diffusion.evaluation.judge import (
    Judge,
    JudgeNetwork,
    Shape,
    load_judge,
    on_object,
    read_judge,
    save_judge,
)

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


def judge_of(shape):
    """A random judge that has two nouns, two colours and one prototype."""
    torch.manual_seed(1)
    network = JudgeNetwork(3, 2, shape).eval().requires_grad_(False)
    prototype = torch.nn.functional.normalize(torch.ones(1, shape.embedding), dim=1)
    names = ("cat", "owl"), ("red", "blue")
    return Judge(shape, network, *names, prototype, ("cat",), 0.5, {"sharp": 1.0})


def test_a_file_says_the_sizes_of_its_network(rows, tmp_path):
    stages = ((4, 0), (6, 0), (8, 2), (10, 1))
    shape = Shape(side=128, stages=stages, embedding=12, cells=3, cell_channels=5)
    judge = judge_of(shape)
    halves = {name: value.half() for name, value in judge.network.state_dict().items()}
    judge.network.load_state_dict(halves)  # what a file keeps
    save_judge(judge, tmp_path / "judge.safetensors")
    again = read_judge(tmp_path / "judge.safetensors")
    assert again.shape == shape and again.pools(rows[0])[0].shape == (8, 20)
    assert again.network.identity.in_features == 20 + 9 * 5
    assert again.embed(rows[0]).shape == (8, 12)
    assert torch.equal(again.embed(rows[0]), judge.embed(rows[0]))
    assert again.accuracy == {"sharp": 1.0} and again.threshold == 0.5


def test_the_first_judges_file_says_no_sizes_and_is_read_as_before(rows):
    path = resources.files("rite_diffusion.evaluation") / "judge.safetensors"
    with safe_open(str(path), "pt") as file:
        assert "stages" not in file.metadata()
        weights = {name: file.get_tensor(name) for name in file.keys()}
    judge = load_judge()
    assert judge.shape == Shape(64, ((24, 0), (48, 1), (128, 2)), 64)
    kept = judge.network.state_dict()
    assert all(torch.equal(kept[name], weights[name].to(kept[name].dtype)) for name in kept)


def test_an_object_is_enlarged_to_one_size_wherever_it_is():
    """A square with a dark quarter, here and there, and twice as large."""
    found = []
    for left, top, side in ((8, 12, 48), (60, 72, 48), (20, 12, 96)):
        pixels, mask = torch.ones(1, 1, 128, 128), torch.full((1, 1, 32, 32), 0.2)
        pixels[..., top : top + side, left : left + side] = 0.5
        pixels[..., top : top + side // 2, left : left + side // 2] = 0
        rows, columns = (slice(at // 4, (at + side) // 4) for at in (top, left))
        mask[..., rows, columns] = 0.9
        found.append(on_object(pixels, mask)[0, 0])
    for each in found:
        dark, grey = ((each - value).abs().lt(0.25).float() for value in (0, 0.5))
        assert dark.mean().item() == pytest.approx((1.732 / 2.4) ** 2 / 4, abs=0.015)
        assert grey.mean().item() == pytest.approx(3 * (1.732 / 2.4) ** 2 / 4, abs=0.03)
        rows, columns = dark.nonzero().float().mean(0).tolist()  # the square's upper left quarter
        assert rows == pytest.approx(41, abs=1.5) and columns == pytest.approx(41, abs=1.5)


def test_an_empty_mask_means_the_whole_picture():
    pixels = torch.arange(8.0).expand(1, 1, 8, 8)
    sampled = on_object(pixels, torch.zeros(1, 1, 8, 8)).squeeze()
    reach = 2.4 * (21 / 64) ** 0.5  # of the deviation of eight columns in [-1, 1]
    wanted = 3.5 + reach * (torch.arange(8.0) - 3.5)
    torch.testing.assert_close(sampled[4, 2:6], wanted[2:6], atol=0.06, rtol=0)


def test_where_no_noun_is_seen_the_answer_is_empty(rows):
    judge = judge_of(Shape(side=32, stages=((4, 0), (4, 0)), embedding=4))
    for answer, noun in enumerate(["cat", "owl", ""]):
        judge.network.noun.bias.zero_()[answer] = 100
        assert judge.nouns(rows[0]) == [noun] * 8
        assert judge.pairs(rows[0]) == [(noun, noun)] * 8


def test_the_judge_states_its_accuracy():
    clean = load_judge().accuracy["clean"]
    assert min(clean["noun"], clean["pair"], clean["colour"]) >= 0.97
    assert clean["concept"]["recognised"] >= 0.97
    assert clean["concept"]["nouns_mistaken"] <= 0.01
