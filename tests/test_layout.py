"""Regions that name a word of the prompt find their boxes."""

import numpy as np
import pytest
import torch

import rite_diffusion as rite
from rite_diffusion.backbones.source import load_backbone
from rite_diffusion.errors import ConfigError
from rite_diffusion.generation.attached import Attached
from rite_diffusion.generation.denoise import decode_pictures, denoising, guided
from rite_diffusion.generation.layout import box_of, exclusive_maps, find_boxes
from rite_diffusion.generation.metadata import read_parameters
from rite_diffusion.generation.picture import resolve_boxes, resolve_request
from rite_diffusion.generation.regions import Region, WordRegion, adapter_weights, parse_regions
from rite_diffusion.generation.request import PictureRequest
from shared_bases import shared_base
from subjects import subject_of

PAIR = "a cat on the left and a house on the right on a blue background"


def cut(mask: np.ndarray, box) -> np.ndarray:
    """A box's part of a mask."""
    height, width = mask.shape
    left, top, right, bottom = (round(v * n) for v, n in zip(box, [width, height] * 2, strict=True))
    return mask[top:bottom, left:right]


def boxes_in(backbone, prompt, words, seed=0, steps=25):
    """Boxes of the words, and the plain picture."""
    predict = guided(backbone, [prompt], "", 3.0)
    side = backbone.resolution
    found = find_boxes(
        backbone, predict, prompt, words, seed=seed, steps=steps, width=side, height=side
    )
    *_, latents = denoising(backbone, predict, [seed], steps=steps)
    return found, decode_pictures(backbone, latents)[0]


# --- how they are written ----------------------------------------------------------------------


def test_a_region_at_a_word_survives_parsing_and_writing():
    texts = ["at cat: a <robot> :: dark :: 1,0", "0,0,0.5,1: a dog", "at big red bus: a <bus>"]
    found = parse_regions(texts, "a cat and a big red bus")
    assert found[0] == WordRegion("cat", "a <robot>", "dark", (1.0, 0.0))
    assert found[1] == Region(0, 0, 0.5, 1, "a dog")
    assert isinstance(found[2], WordRegion) and found[2].word == "big red bus"
    assert parse_regions([str(part) for part in found], "a cat and a big red bus") == found
    assert found[0].at(0, 0, 0.5, 1) == Region(0, 0, 0.5, 1, "a <robot>", "dark", (1.0, 0.0))


@pytest.mark.parametrize(
    ("text", "words"),
    [("at dog: a <robot>", "has no 'dog'"), ("at ca: a <robot>", "has no 'ca'"),
     ("at : a <robot>", "is not"), ("at cat", "is not"), ("at cat:", "is not"),
     ("at cat: a :: b :: x", "weights 'x'")],
)  # fmt: skip
def test_regions_at_words_that_the_prompt_lacks_are_refused(text, words):
    with pytest.raises(ConfigError, match=words):
        parse_regions([text], "a cat in a park")


def test_a_region_at_a_word_calls_adapters_like_a_box():
    parts = parse_regions(["at cat: a <robot>"], "a cat")
    assert adapter_weights(parts, "a cat", [["<robot>"], ["<style>"]]) == [[0, 1], [1, 1]]


# --- boxes -------------------------------------------------------------------------------------


def test_a_box_surrounds_large_values_and_ignores_small_ones():
    values = torch.zeros(16, 16)
    values[4:8, 2:7] = 1.0
    values[13, 13] = 0.2
    assert box_of(values) == (1 / 16, 3 / 16, 8 / 16, 9 / 16)


def test_each_cell_belongs_to_one_word():
    maps = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert (exclusive_maps(maps) > 0).sum(0).eq(1).all()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_boxes_find_the_objects_of_pocket_pictures(pocket, seed):
    (cat, house), image = boxes_in(pocket, PAIR, ["cat", "house"], seed)
    there = subject_of(image, 90)
    side = there.shape[1]
    halves = (there[:, : side // 2].sum(), there[:, side // 2 :].sum())
    assert cut(there, cat).sum() > 0.8 * halves[0] and cat[2] < 0.65
    assert cut(there, house).sum() > 0.8 * halves[1] and house[0] > 0.35
    [cake], image = boxes_in(pocket, "a small cake on a red background", ["cake"], seed)
    there = subject_of(image, 90)
    assert cut(there, cake).sum() > 0.9 * there.sum()  # all of it, and little else
    assert (cake[2] - cake[0]) * (cake[3] - cake[1]) < 0.5


def test_a_word_without_effect_on_the_picture_is_refused(tiny_folder):
    backbone = load_backbone(str(tiny_folder))
    for module in backbone.cross_attentions:
        module.to_out[0].weight.data.zero_()  # the prompt is not heard
    with pytest.raises(ConfigError, match="the same without 'cat'"):
        boxes_in(backbone, "a cat", ["cat"], steps=2)


def test_finding_boxes_draws_half_of_the_steps(tiny_folder):
    backbone = shared_base(str(tiny_folder))
    predict, count = guided(backbone, ["a cat"], "", 3.0), []

    def counted(latents, timestep):
        count.append(timestep)
        return predict(latents, timestep)

    side = backbone.resolution
    find_boxes(backbone, counted, "a cat", ["cat"], seed=0, steps=7, width=side, height=side)
    assert len(count) == 4


# --- pictures ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tiny_folder", "tiny_folder_xl"])
def test_a_pictures_metadata_has_the_boxes_and_redraws_it(kind, request, tmp_path):
    base = str(request.getfixturevalue(kind))
    settings = {"base": base, "steps": 3, "num": 2, "width": 96}
    regions = ["at cat: a red cat", "0,0,0.3,0.3: a tree :: dark"]
    images = rite.generate("a cat in a park", regions=regions, out=tmp_path, **settings)
    parts = [read_parameters(image.info["path"]).regions for image in images]
    assert all(part[0].endswith(": a red cat") and part[1] == regions[1] for part in parts)
    assert not any("at cat" in text for part in parts for text in part)
    for seed, (image, part) in enumerate(zip(images, parts, strict=True)):
        [again] = rite.generate("a cat in a park", regions=part, seed=seed, **settings | {"num": 1})
        assert np.array_equal(np.asarray(image), np.asarray(again))


def test_the_layout_is_drawn_without_the_adapters_that_regions_call(tiny_folder, monkeypatch):
    backbone = shared_base(str(tiny_folder))
    turns = []
    monkeypatch.setattr(
        "rite_diffusion.generation.attached.set_weight",
        lambda model, name, weight: turns.append((name, weight)),
    )
    request = PictureRequest(prompt="a cat", steps=2, guidance=3.0, regions=["at cat: a <robot>"])
    wanted = resolve_request(backbone, request)
    adapters = [Attached("a", 0.7, ["<robot>"]), Attached("b", 0.5, ["<style>"])]
    resolve_boxes(backbone, wanted, adapters)
    assert turns == [("a", 0.0), ("b", 0.5), ("a", 0.7), ("b", 0.5)]
