"""The judge's training: what its batches say, its losses, its threshold, and interrupted runs."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch.nn import functional as F

from emoji_sprites import disc_sprites
from rite_diffusion.evaluation.judge import JudgeNetwork, read_judge
from train import robot as toy
from train.pocket import (
    __main__ as stages,
)
from train.pocket import (
    emoji,
    flaws,
    judge,
    judge_figures,
    judge_pictures,
    judge_scenes,
    judge_sprites,
    machine,
    made_up,
    robots,
    world,
)

CPU = machine.Machine(torch.device("cpu"), uses_bf16=False, workers=0)
TINY = judge.Settings(
    pictures=4 * judge_scenes.BATCH, widths=(4, 4, 4, 8), blocks=(0, 0, 0, 0), embedding=8, cells=2
)
SPARE = tuple(f"spare-{letter}" for letter in "abcdefghijklmnopqrstuvwxyz")
CATEGORIES = dict.fromkeys(SPARE, "Spare") | {"cat-face": "Cats"}
CACHES = (
    emoji.training_keys, judge_sprites.spare_names, judge_sprites.training_keys,
    judge_sprites.kin, judge_scenes.noun_keys, judge_figures.world_scenes,
)  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def drawn_sprites():
    """Discs in the place of emoji."""
    found = disc_sprites(*SPARE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(emoji, "sprites", lambda: found)
        patch.setattr(judge_sprites, "categories", lambda: CATEGORIES)
        patch.setattr(made_up, "FIGURES", 3)
        patch.setattr(judge_sprites, "FIGURES", 3)
        patch.setattr(toy, "OVERSAMPLING", 1)
        patch.setattr(toy, "UNIT", toy.SIDE / 64)
        for cached in CACHES:
            cached.cache_clear()
        yield
    for cached in CACHES:
        cached.cache_clear()


@pytest.fixture(scope="module")
def batch():
    return judge_scenes.batch([0])


# --- sprites -----------------------------------------------------------------------------------


def test_nothing_held_out_or_kept_aside_is_trained_on():
    names = {name for _, name in judge_sprites.training_keys()}
    assert not names & {*emoji.HELD_OUT} and not names & {*judge_sprites.spare_names()}
    assert {*world.NOUNS.values()} <= names
    assert judge_sprites.spare_names() and not {*judge_sprites.spare_names()} & {*emoji.HELD_OUT}


def face():
    """A sprite whose halves, colours and parts differ."""
    image = Image.new("RGBA", (128, 128))
    pen = ImageDraw.Draw(image)
    pen.ellipse((4, 10, 124, 120), (230, 190, 40))
    pen.ellipse((30, 40, 52, 62), (30, 30, 60))
    pen.rectangle((70, 44, 100, 60), (200, 30, 30))
    pen.arc((40, 60, 96, 104), 20, 160, (20, 90, 30), 8)
    return judge_sprites.sprite(image)


@pytest.mark.parametrize("kind", judge_sprites.ALTERATIONS)
def test_a_near_miss_differs_and_is_a_sprite(kind):
    changed = judge_sprites.altered(np.random.default_rng(1), face(), (kind,))
    assert judge_sprites.differs(changed, face()) and changed.dtype == np.float32
    assert changed.min() >= 0 and (changed[..., :3] <= changed[..., 3:] + 1e-5).all()
    kept = np.abs(changed - face()).max(-1) < 0.02
    assert kind == "hue turned" or kept.mean() > 0.4  # and most of it stays


def test_where_nothing_can_change_a_sprite_stays_as_it_is():
    empty = np.zeros((128, 128, 4), np.float32)
    rng = np.random.default_rng(0)
    assert judge_sprites.altered(rng, empty) is empty
    disc = judge_sprites.sprite(judge_sprites.picture(("flat", "cat-face")))
    mirrored = judge_sprites.altered(rng, disc, ("half mirrored",))
    assert not judge_sprites.differs(mirrored, disc)


def test_a_sprite_becomes_the_same_picture_again():
    picture = judge_sprites.as_image(face())
    again = judge_sprites.as_image(judge_sprites.sprite(picture))
    assert np.abs(np.asarray(again, int) - np.asarray(picture, int)).max() <= 1


def test_relatives_are_of_the_same_kind():
    rng = np.random.default_rng(0)
    key = ("flat", "cat-face")
    others = {judge_sprites.relative(rng, key) for _ in range(60)} - {key}
    styles = {key for key in others if key[1] == "cat-face"}
    assert styles == {(style, "cat-face") for style in ("3d", "fluent", "twemoji")}
    assert others - styles and all(
        {"cat", "face"} & {*name.split("-")} for _, name in others - styles
    )
    figures = {judge_sprites.relative(rng, ("figure 2", "0")) for _ in range(40)}
    assert figures == {("figure 2", str(i)) for i in (1, 2, 3)}


def test_the_figures_of_a_family_differ_in_part():
    first, *others = (judge_sprites.sprite(made_up.figure(1, i)) for i in range(4))
    assert all(judge_sprites.differs(first, other) for other in others)
    assert np.array_equal(judge_sprites.sprite(made_up.figure.__wrapped__(1, 0)), first)


def test_other_robots_are_not_the_robot():
    wanted = judge_sprites.sprite(toy.robot().resize((101, 128)))
    for name, picture in robots.pictures().items():
        other = judge_sprites.sprite(picture.resize((101, 128)))
        assert np.abs(wanted - other).mean() > 0.0008, name  # of the mouth alone 0.0009


# --- flaws -------------------------------------------------------------------------------------


def test_blur_is_gaussian_with_the_given_deviation():
    point = torch.zeros(2, 1, 64, 64)
    point[:, :, 32, 32] = 1
    soft = flaws.blurred(point, torch.tensor([1.0, 2.5]).view(2, 1, 1, 1))
    offset = torch.arange(64.0) - 32
    variance = (soft.sum(-1).squeeze(1) * offset**2).sum(-1)
    assert soft.sum((1, 2, 3)) == pytest.approx([1.0, 1.0], abs=1e-4)
    assert variance.tolist() == pytest.approx([1.0, 6.25], rel=1e-3)


def test_a_flaw_deserves_less_the_stronger_it_is():
    sigma = torch.tensor([0.0, 1.2, 2.0, 3.0, 4.0])
    deserved = flaws.blur_deserves(sigma)
    assert deserved[0] == 1 and (deserved.diff() < 0).all()
    assert deserved[1:].tolist() == pytest.approx([0.702, 0.467, 0.247, 0.116], abs=1e-3)


@pytest.mark.parametrize("flaw", flaws.FLAWS, ids=lambda flaw: flaw.__name__)
def test_a_flaw_that_deserves_less_changes_more(flaw):
    torch.manual_seed(0)
    sharp = torch.from_numpy(face()[..., :3]).permute(2, 0, 1).expand(24, 3, 128, 128) * 2 - 1
    poor, deserved = flaw(sharp)
    error = (poor - sharp).square().mean((1, 2, 3))
    order = judge_figures.rank_correlation(error, deserved)
    assert poor.shape == sharp.shape and deserved.min() > 0 and deserved.max() < 1
    assert order < -0.7


# --- batches -----------------------------------------------------------------------------------


def test_a_batch_has_groups_then_pairs_then_blanks(batch):
    pixels, labels = batch
    covered = labels["mask"].mean((1, 2, 3))
    is_blank = torch.arange(len(pixels)) >= len(pixels) - judge_scenes.BLANKS
    assert (covered[~is_blank] > 0.02).all() and (covered[is_blank] == 0).all()
    groups, size = judge_scenes.GROUPS, judge_scenes.BATCH
    assert pixels.shape == (size, 3, 128, 128) and pixels.abs().max() <= 1
    identity = labels["identity"]
    one, two, near, poor = identity[: 5 * groups].split([groups, groups, 2 * groups, groups])
    assert torch.equal(one, two) and (one != judge_scenes.UNKNOWN).all()
    assert not {*near.tolist()} & {*one.tolist()} and (near != judge_scenes.UNKNOWN).any()
    assert (poor == judge_scenes.UNKNOWN).all()
    assert (labels["noun"][-judge_scenes.BLANKS :] == judge_scenes.NOTHING).all()
    pairs = slice(5 * groups, 5 * groups + judge_scenes.PAIRS)
    assert torch.equal(labels["left_identity"][pairs], one[: judge_scenes.PAIRS])
    assert (labels["right_identity"][pairs] != labels["left_identity"][pairs]).any()


def test_the_poorest_pictures_show_no_noun(batch):
    _, labels = batch
    rows = slice(4 * judge_scenes.GROUPS, 5 * judge_scenes.GROUPS)
    nouns, deserved = labels["noun"][rows], labels["deserved"]
    assert (nouns[deserved < judge_scenes.NAMELESS] == judge_scenes.NOTHING).all()
    between = (deserved > judge_scenes.NAMELESS) & (deserved <= judge_scenes.NAMED)
    assert (nouns[between] == judge_scenes.UNKNOWN).all()


def test_a_batch_is_drawn_by_its_seed(batch):
    again = judge_scenes.batch([0])
    assert torch.equal(again[0], batch[0])
    assert all(torch.equal(again[1][name], labels) for name, labels in batch[1].items())
    assert not torch.equal(judge_scenes.batch([1])[0], batch[0])


def test_a_subject_is_called_by_its_noun():
    rng = np.random.default_rng(0)
    noun = judge_scenes.noun_of(rng, ("twemoji", "cat-face"))
    assert judge_scenes.NOUNS[noun] == "cat"
    assert judge_scenes.noun_of(rng, ("figure 1", "0")) == judge_scenes.NOTHING
    assert judge_scenes.noun_of(rng, ("flat", "black-cat")) == judge_scenes.UNKNOWN


# --- losses ------------------------------------------------------------------------------------


def test_the_sameness_loss_equals_its_definition():
    torch.manual_seed(0)
    embeddings = F.normalize(torch.randn(6, 4), dim=-1)
    identities = [5, 5, -2, 7, 5, judge_scenes.UNKNOWN]
    found, pairs = 0.0, 0
    for i, j in [(i, j) for i in range(5) for j in range(5)]:
        if i == j or identities[i] != identities[j]:
            continue
        cosine = [float(embeddings[i] @ embeddings[k]) for k in range(5)]
        others = sum(math.exp(20 * cosine[k]) for k in range(5) if identities[k] != identities[i])
        own = math.exp(20 * (cosine[j] - 0.2))
        found, pairs = found - math.log(own / (own + others)), pairs + 1
    loss = judge.sameness_loss(embeddings, torch.tensor(identities))
    assert pairs == 6 and loss.item() == pytest.approx(found / pairs, rel=1e-5)


def test_near_misses_must_be_far_and_poor_pictures_as_far_as_they_deserve():
    n = judge_scenes.GROUPS
    east, north = torch.tensor([[1.0, 0.0]]).expand(n, 2), torch.tensor([[0.0, 1.0]]).expand(n, 2)
    labels = {
        "identity": torch.arange(5 * n),
        "allowed": torch.full((2 * n,), 0.5),
        "deserved": torch.full((n,), 0.25),
    }
    far = judge.group_losses(torch.cat([east, east, north, north, east]), labels)
    assert far["near"] == 0 and far["poor"].item() == pytest.approx(judge.GRADED * 0.75**2)
    close = judge.group_losses(torch.cat([east, east, east, north, north]), labels)
    assert close["near"].item() == pytest.approx(judge.GRADED * 0.5**2 / 2)
    assert close["poor"].item() == pytest.approx(judge.GRADED * 0.25**2)


def test_a_near_miss_may_be_the_nearer_the_less_it_differs():
    at = [judge_scenes.allowed_cosine(judge_sprites.CHANGE * times) for times in (1, 4, 20)]
    assert at == pytest.approx([0.85, 0.597, 0.4507], abs=1e-3)


# --- training ----------------------------------------------------------------------------------


def test_an_interrupted_training_ends_with_the_same_weights(batch, tmp_path, monkeypatch):
    monkeypatch.setattr(judge_scenes, "batch", lambda seed: (batch[0].roll(seed[0], 1), batch[1]))
    judge.train(tmp_path / "whole", TINY, CPU)

    class Stopped(Exception):
        pass

    def stopping(self, pixels, labels, seen, step=judge.Training.step):
        if seen == 2 * judge_scenes.BATCH:
            raise Stopped
        return step(self, pixels, labels, seen)

    with monkeypatch.context() as patch:
        patch.setattr(machine, "SAVE_SECONDS", -1)  # a state after every step
        patch.setattr(judge.Training, "step", stopping)
        with pytest.raises(Stopped):
            judge.train(tmp_path / "parts", TINY, CPU)
    with pytest.raises(SystemExit, match="until 280 pictures, 140 are seen"):
        judge.finished(tmp_path / "parts", TINY)
    judge.train(tmp_path / "parts", TINY, CPU)
    whole, parts = (machine.load_file(tmp_path / name / judge.STATE) for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_training_teaches_every_question(batch):
    training = judge.Training(replace(TINY, pictures=10**6, rate=1e-2), CPU)
    first = training.step(*batch, 3000)
    for _ in range(15):
        last = training.step(*batch, 3000)
    assert first.keys() == last.keys() == {*judge.LABELLED, "mask", "same", "near", "poor"}
    assert all(last[name] < first[name] for name in (*judge.LABELLED, "same", "near", "poor"))


# --- figures -----------------------------------------------------------------------------------


def test_the_threshold_lets_one_near_miss_in_ten_pass():
    scores = torch.cat([torch.linspace(-1, 0.6, 180), torch.linspace(0.7, 0.9, 20)])
    threshold = judge_figures.least_refusing(scores)
    assert (scores > threshold).sum() == 20 and threshold > 0.6


def test_rank_correlation_is_spearmans():
    stats = pytest.importorskip("scipy.stats")
    one, other = torch.randn(3, 9), torch.randn(3, 9)
    found = judge_figures.rank_correlation(one, other)
    wanted = [stats.spearmanr(a, b).statistic for a, b in zip(one, other, strict=True)]
    assert found.tolist() == pytest.approx(wanted)
    assert judge_figures.rank_correlation(one[:1], -one[:1].exp()).item() == pytest.approx(-1)


@pytest.mark.parametrize("name", judge_pictures.CHANGES)
def test_changes_keep_a_pictures_size_and_do_not_vary(name):
    picture = Image.fromarray(world.scene(np.random.default_rng(0)).image)
    change = judge_pictures.CHANGES[name]
    one, again = change(picture), change(picture)
    assert one.size == (128, 128) and one.tobytes() == again.tobytes()
    assert (one.tobytes() == picture.tobytes()) == (name == "sharp")


def test_the_stage_writes_a_judge_with_its_figures(batch, tmp_path, monkeypatch):
    monkeypatch.setattr(judge_scenes, "batch", lambda seed: batch)
    monkeypatch.setattr(stages, "RESULTS", tmp_path)
    monkeypatch.setattr(judge_figures, "NOUN_PHOTOS", 1)
    monkeypatch.setattr(judge_figures, "PICTURES", 1)
    monkeypatch.setattr(judge_figures, "PHOTOS", 1)
    monkeypatch.setattr(judge_figures, "SCENES", 10)
    changes = {name: judge_pictures.CHANGES[name] for name in ("sharp", "bent")}
    monkeypatch.setattr(judge_figures, "CHANGES", changes)
    monkeypatch.setattr(judge_figures, "SIGMAS", (0.0, 1.0, 2.0))
    few = {name: robots.ROBOTS[name] for name in ("no eyes", "no arms")}
    monkeypatch.setattr(robots, "ROBOTS", few)
    monkeypatch.setattr(judge_figures, "held_out_keys", lambda: [("flat", "unicorn")])
    monkeypatch.setattr(judge_figures, "SHOWN", ("robot", "3d unicorn"))
    given = ["pictures=70", "widths=4,4,4,8", "blocks=0,0,0,0", "embedding=8", "cells=2"]
    stages.run_judge(tmp_path, given)
    made = read_judge(tmp_path / "judge.safetensors")
    assert made.shape == replace(TINY, pictures=70).shape and made.shape.side == 128
    assert len(made.prototypes) == len(world.NOUNS) and made.network.noun.out_features == 103
    figures = json.loads((tmp_path / "judge_128.json").read_text())
    assert figures["command"] == f"python -m train.pocket judge --set {' '.join(given)}"
    assert figures["accuracy"] == made.accuracy and figures["threshold"] == made.threshold
    assert {*made.accuracy["pictures"]} == {*changes}
    assert {*made.accuracy["robots_mistaken"]} == {*robots.ROBOTS}
    assert Image.open(tmp_path / "judge.png").size[1] == 2 * 162
    assert isinstance(made.network, JudgeNetwork)
