"""Several concepts in one run, pictures of their classes, and held-out photos."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from PIL import Image

import rite_diffusion as rite
from rite_diffusion.cli.output import PlanPrinter
from rite_diffusion.config import from_toml, read_toml, resolve, to_toml
from rite_diffusion.errors import ConfigError, PhotoFolderError, RunError
from rite_diffusion.files.writing import cache_folder
from rite_diffusion.methods.triggers import check_triggers
from rite_diffusion.photos.dataset import balanced
from rite_diffusion.photos.folder import read_folder
from rite_diffusion.training.configured import step_batch
from rite_diffusion.training.plan import (
    Plan,
    PlanObserver,
    find_pictures,
    plan_training,
    plan_without_drawing,
)
from rite_diffusion.training.settings import configure
from rite_diffusion.types import Concept
from runs import QUICK, config_of, train

TWO = """
class_noun = "toy"
templates = ["the {trigger}"]

[[dataset]]
repeats = 2

[[dataset.subset]]
photos = "one"
trigger = "<one>"

[[dataset.subset]]
photos = "two"
trigger = "<two>"
class_noun = "cup"
repeats = 3

[[dataset]]
photos = "more"
trigger = "<one>"
"""


def plan_of(config) -> Plan:
    """A plan whose class pictures are not drawn."""
    return plan_without_drawing(config, find_pictures(config))


@pytest.fixture
def two(tmp_path, monkeypatch):
    """The settings of TWO, with its folders of 4, 1 and 1 photos."""
    monkeypatch.chdir(tmp_path)
    for folder, count in (("one", 4), ("two", 1), ("more", 1)):
        (tmp_path / folder).mkdir()
        for index in range(count):
            shade = (60 * index, 10 * count, 200)
            Image.new("RGB", (80, 80), shade).save(tmp_path / folder / f"{index}.png")
    (tmp_path / "two.toml").write_text(TWO)
    return read_toml(tmp_path / "two.toml") | {"prior": {"weight": 0}}


def test_a_photo_folder_inherits_what_it_leaves_out(two):
    sources = resolve(two).sources()
    assert [(s.photos, s.concept, s.repeats) for s in sources] == [
        ("one", Concept("<one>", "toy"), 2),
        ("two", Concept("<two>", "cup"), 3),
        ("more", Concept("<one>", "toy"), 1),
    ]
    assert all(source.templates == ["the {trigger}"] for source in sources)
    config = resolve(two)
    assert from_toml(to_toml(config)) == config


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dataset": [{"photos": "one"}]}, "'trigger' is missing for photo folder 1"),
        ({"dataset": [{"trigger": "<t>"}]}, "dataset.0: neither photos nor a subset"),
        ({"dataset": [{"photos": "a", "triger": "x"}]}, "did you mean 'dataset.trigger'"),
        ({"dataset": [], "photos": "a"}, "'trigger' is missing"),
        ({"class_photos": "dogs"}, "only with prior.weight above 0"),
        ({"augment": {"crop": 0.1}}, "need augment.views of 2 or more"),
    ],
)
def test_missing_dataset_settings_are_named(two, change, words):
    with pytest.raises(ConfigError) as fault:
        resolve(two | change)
    assert words in str(fault.value)


def test_concepts_are_balanced_unless_balance_is_off(two):
    plan = plan_training(configure(two))
    shown = {"<one>": 0, "<two>": 0}
    for photo in plan.photos:
        shown[photo.caption.removeprefix("the ")] += photo.repeats
    assert shown == {"<one>": 9, "<two>": 9}
    plain = plan_training(configure(two | {"balance": False}))
    assert [photo.repeats for photo in plain.photos] == [2, 2, 2, 2, 1, 3]


def test_several_concepts_become_one_adapter_with_previews_of_each(two, tmp_path):
    two |= QUICK | {"dataset": two["dataset"]}
    del two["previews"]["steps"]
    plan = plan_training(configure(two | {"previews": {"every": 3, "steps": 1}}))
    from rite_diffusion.training.run import run_training

    info = rite.inspect(run_training(plan, tmp_path / "run")).info
    assert (info.trigger, info.class_noun, info.images) == ("<one>, <two>", "toy, cup", "6")
    assert str(tmp_path) not in info.config
    assert len(list((tmp_path / "run/previews").iterdir())) == 4


class Heard(PlanObserver):
    """Keeps what is told of class pictures."""

    def __init__(self, lines: list[str]):
        self.drawing = lines.append


def test_class_pictures_are_drawn_once_and_have_the_prior_weight(photos, pocket):
    lines = []
    prior = {"weight": 0.5, "count": 2, "prompts": ["a {class_noun}"]}
    plan = plan_training(config_of(photos, prior=prior), Heard(lines))
    assert lines == ['drawing 2 pictures of "a toy" and the like']
    assert len(list(cache_folder().rglob("*.png"))) == 2
    again = plan_training(config_of(photos, prior=prior), Heard(lines))
    assert len(lines) == 1 and again.inputs() == plan.inputs()
    weights = [(photo.caption, photo.weight) for photo in plan.photos if photo.weight != 1]
    assert weights == [("a toy", 0.5)] * 2
    shown = [sum(p.repeats for p in plan.photos if (p.weight != 1) == own) for own in (0, 1)]
    assert shown == [6, 6]


def test_class_photos_can_be_given(photos, tmp_path):
    folder = tmp_path / "toys"
    folder.mkdir()
    Image.new("RGB", (70, 70), "white").save(folder / "a.png")
    plan = plan_training(config_of(photos, prior={"weight": 1.0}, class_photos=str(folder)))
    assert [photo.path.parent.name for photo in plan.class_photos] == ["toys"]
    assert not list(cache_folder().rglob("*.png"))


def _toys(folder, shade=200, **captions):
    """A folder of two pictures of other toys, with captions by stem."""
    folder.mkdir()
    for stem in ("a", "b"):
        Image.new("RGB", (70, 70), (shade, ord(stem), 0)).save(folder / f"{stem}.png")
    for stem, text in captions.items():
        (folder / f"{stem}.txt").write_text(text)
    return str(folder)


def test_given_class_pictures_have_their_own_captions(photos, tmp_path):
    toys = _toys(tmp_path / "toys", a="two {class_noun}s")
    prior = {"weight": 1.0, "prompts": ["a cat on a yellow background"]}
    plan = plan_of(config_of(photos, prior=prior, class_photos=toys))
    assert [photo.caption for photo in plan.class_photos] == ["two toys", "a toy"]


def test_class_pictures_that_show_the_concept_are_refused(photos, tmp_path):
    prior = {"weight": 1.0}
    with pytest.raises(ConfigError, match="holds the photos of <thing>"):
        plan_of(config_of(photos, prior=prior, class_photos=str(photos)))
    copied = tmp_path / "copied"
    shutil.copytree(photos, copied)
    for path in copied.glob("*.txt"):
        path.unlink()
    with pytest.raises(ConfigError, match="copied/0.png is the concept's photo 0.png"):
        plan_of(config_of(photos, prior=prior, class_photos=str(copied)))
    said = _toys(tmp_path / "said", a="a <THING>, red")
    with pytest.raises(ConfigError, match=r'"a <THING>, red" of .*a.png holds the trigger <thing>'):
        plan_of(config_of(photos, prior=prior, class_photos=said))
    filled = _toys(tmp_path / "filled", a="a {trigger}")
    with pytest.raises(PhotoFolderError, match=r"a.txt: unknown placeholder \{trigger\}"):
        plan_of(config_of(photos, prior=prior, class_photos=filled))


def test_several_folders_of_one_class_are_joined(photos, tmp_path, capsys):
    one, two = _toys(tmp_path / "one"), _toys(tmp_path / "two", shade=100)
    table = {"photos": str(photos), "trigger": "<thing>", "class_noun": "toy"}
    subsets = [table | {"class_photos": one}, table | {"class_photos": two}, table]
    plan = plan_of(
        resolve(
            QUICK
            | {
                "prior": {"weight": 1.0},
                "dataset": [{"subset": subsets}],
                "optim": {"lr_unet": 1e-3, "lr_text_encoder": 1e-3},
            }
        )
    )
    assert [p.path.parent.name for p in plan.class_photos] == ["one"] * 2 + ["two"] * 2
    assert plan.undrawn == []
    plan_training(plan.config, PlanPrinter())
    said = capsys.readouterr().out
    assert f"2 pictures in {one}" in said and f"2 pictures in {two}" in said


def test_photos_and_class_pictures_are_shown_equally_often(photos):
    [photo] = read_folder(photos, Concept("<t>", "toy"), ["a"]).photos[:1]
    for counts in ((19, 28), (6, 28), (3, 2), (1, 1000), (7, 200, 33)):
        groups = [[replace(photo, caption=str(n))] * count for n, count in enumerate(counts)]
        shown = dict.fromkeys(map(str, range(len(counts))), 0)
        for each in balanced(groups):
            shown[each.caption] += each.repeats
        assert max(shown.values()) / min(shown.values()) < 1.23, counts
        assert all(value >= count for value, count in zip(shown.values(), counts, strict=True))
    nineteen = balanced([[photo] * 19, [photo] * 28])
    assert sum(each.repeats for each in nineteen[:19]) == 57
    assert sum(each.repeats for each in nineteen[19:]) == 56


@pytest.mark.parametrize(
    ("one", "other", "words"),
    [
        (("<rex>", "dog"), ("<REX>", "dog"), "<rex> and <REX> are the same tokens"),
        (("<rex>", "dog"), ("<rex>", "cat"), "<rex> stands for dog and cat"),
        (("<rex>", "dog"), ("big <rex>", "dog"), "are one inside the other"),
    ],
)
def test_triggers_with_the_same_tokens_are_refused(pocket, one, other, words):
    with pytest.raises(ConfigError, match=words):
        check_triggers(pocket, [Concept(*one), Concept(*other)])
    check_triggers(pocket, [Concept(*one), Concept("<tom>", "cat")])


def test_triggers_with_the_same_tokens_are_refused_by_every_method(two):
    twins = [{"photos": "one", "trigger": "<rex>"}, {"photos": "two", "trigger": "<Rex>"}]
    for method in ("lora", "pivotal"):
        preset = "pocket" if method == "lora" else f"pocket-{method}"
        settings = two | {"dataset": [{"subset": twins}], "method": method}
        with pytest.raises(ConfigError, match="same tokens"):
            plan_of(configure(settings, preset))


def test_a_trigger_at_the_end_of_a_long_caption_is_kept(photos, capsys):
    long = " ".join(["red"] * 80)
    (photos / "0.txt").write_text(f"{long} and a {{trigger}}")
    (photos / "1.txt").write_text(f"a <thing> and {long}")
    plan = plan_of(config_of(photos))
    kept, whole, _ = (photo.caption for photo in plan.folder.photos)
    assert kept.startswith("red red") and kept.endswith(" <thing>")
    budget = plan.backbone.token_budget
    assert budget - 1 <= plan.backbone.token_count(kept) <= budget
    assert whole == f"a <thing> and {long}"
    assert {photo.caption for photo in plan.photos} == {
        photo.caption for photo in plan.folder.photos
    }
    assert plan.backbone.token_positions(kept, "<thing>")
    plan_training(plan.config, PlanPrinter())
    assert f'moved       "{long} and a <thing>" has <thing> beyond the' in capsys.readouterr().out


def test_photos_are_reported_before_class_pictures_are_drawn(photos, monkeypatch, capsys):
    from rite_diffusion.cli import app as cli
    from rite_diffusion.training import plan

    def draw(*_):
        raise RunError(capsys.readouterr().out)

    monkeypatch.setattr(plan, "class_pictures", draw)
    line = ["train", str(photos), "--trigger", "<thing>", "--class", "toy", "--dry-run"]
    with pytest.raises(RunError) as fault:
        cli.app(line, standalone_mode=False)
    said = str(fault.value)
    assert "photos      3 in" in said and "class       28 pictures for toy by the base" in said


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"previews": {"prompts": ["a {Trigger}"]}}, r"previews.prompts.0: .*\{Trigger\}"),
        ({"templates": ["a {trigger}", "{ trigger }"]}, r"templates.1: .*\{ trigger \}"),
        ({"prior": {"prompts": ["a {trigger}"]}}, r"prior.prompts.0: .*only \{class_noun\} can"),
        ({"method": "pivotal", "tokens": {"init": "{noun}"}}, r"tokens.init: .*\{noun\}"),
    ],
)
def test_unknown_placeholders_are_refused_by_name(photos, settings, words):
    with pytest.raises(ConfigError, match=words):
        config_of(photos, **settings)


def test_previews_fill_in_trigger_and_class(photos, tmp_path, monkeypatch):
    from rite_diffusion.training import previews
    from rite_diffusion.training.run_folder import RunFolder

    drawn = []
    image = Image.new("RGB", (8, 8))
    encode = lambda _, prompts, negative: drawn.extend(prompts)  # noqa: E731
    monkeypatch.setattr(previews, "encode_for_guidance", encode)
    monkeypatch.setattr(previews, "sample_encoded", lambda *a, **k: [image])
    prompts = ["a {trigger} and a {class_noun}", "a {red|blue} {class_noun}"]
    plan = plan_of(config_of(photos, previews={"every": 1, "prompts": prompts}))
    with RunFolder(tmp_path / "run") as folder:
        previews.write_previews(plan.backbone, plan.config, folder, 1, None)
    assert drawn == ["a <thing> and a toy", "a {red|blue} toy"]


def test_the_prior_weight_scales_the_class_pictures_loss(photos, tmp_path):
    from rite_diffusion.methods import PlainLora
    from rite_diffusion.photos.dataset import encode_photos
    from rite_diffusion.training.configured import step_loss

    losses = {}
    for weight in (1.0, 3.0):
        plan = plan_training(config_of(photos, batch=8, prior={"weight": weight, "count": 2}))
        data = encode_photos(plan.backbone, plan.photos, plan.encoding)
        batch = step_batch(plan.backbone, data, plan.config, 0)
        method = PlainLora(plan.backbone, plan.config)
        losses[weight] = [
            step_loss(plan.backbone, method, part, plan.config).item() for part in batch.parts(8)
        ]
        own = batch.weights == 1 if weight == 3 else None
    for plain, heavy, is_own in zip(losses[1.0], losses[3.0], own.tolist(), strict=True):
        assert heavy == pytest.approx(plain if is_own else 3 * plain, rel=1e-4)
    assert 0 < own.sum() < 8


def test_held_out_photos_are_not_trained_on_but_measured(photos, tmp_path):
    settings = {"validation": {"photos": 1, "every": 2}, "previews": {"every": 0}}
    plan = plan_training(config_of(photos, **settings))
    assert len(plan.photos) == 2 and len(plan.held_out) == 1
    assert plan.held_out[0].path not in {photo.path for photo in plan.photos}
    train(photos, tmp_path / "run", **settings)
    lines = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    values = [line.get("validation") for line in lines]
    assert values[0] is None and values[1] > 0 and values[2] > 0
    train(photos, tmp_path / "all", previews={"every": 0})
    assert "validation" not in (tmp_path / "all/metrics.jsonl").read_text()
    with pytest.raises(ConfigError, match="leaves no photo of <thing> to train on"):
        plan_training(config_of(photos, validation={"photos": 3}))


def test_the_validation_loss_is_a_function_of_the_weights_alone(photos, pocket):
    from rite_diffusion.methods import PlainLora
    from rite_diffusion.photos.dataset import encode_photos
    from rite_diffusion.training.validation import held_out_loss

    plan = plan_training(config_of(photos, validation={"photos": 1}))
    data = encode_photos(pocket, plan.held_out, plan.encoding)
    method = PlainLora(pocket, plan.config)
    first, again = (held_out_loss(pocket, method, data, plan.config) for _ in range(2))
    assert first == again
    one_by_one = plan.config.model_copy(update={"batch": 1})
    assert held_out_loss(pocket, method, data, one_by_one) == pytest.approx(first, rel=1e-4)
    with torch.no_grad():
        for pair in method.pairs():
            pair.up.add_(0.1)
    assert held_out_loss(pocket, method, data, plan.config) != pytest.approx(first, rel=1e-2)
