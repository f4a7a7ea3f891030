import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import rite_diffusion as rite
from rite_diffusion.adapters import load_adapter, save_adapter
from rite_diffusion.adapters.choice import split_weight
from rite_diffusion.api.sheet import grid, plan_sheet
from rite_diffusion.errors import AdapterError, ConfigError, RiteError
from rite_diffusion.fusion.statistics import Drawing
from rite_diffusion.generation.denoise import sample
from rite_diffusion.generation.grid import labelled_grid
from rite_diffusion.generation.metadata import read_parameters

PROMPT = "a cat on a blue background"


def test_the_same_parameters_give_the_same_pixels(tmp_path):
    first = rite.generate(PROMPT, seed=5, num=2, steps=4, out=tmp_path)
    facts = read_parameters(tmp_path / "00001.png")
    assert (facts.prompt, facts.seed, facts.steps, facts.base) == (PROMPT, 6, 4, "pocket")
    [again] = rite.generate(
        facts.prompt,
        seed=facts.seed,
        steps=facts.steps,
        guidance=facts.guidance,
        width=facts.width,
        height=facts.height,
    )
    assert np.array_equal(np.asarray(again), np.asarray(Image.open(tmp_path / "00001.png")))
    assert not np.array_equal(np.asarray(first[0]), np.asarray(first[1]))


def test_a_batch_draws_what_single_pictures_draw(pocket):
    together = sample(pocket, [PROMPT] * 3, [1, 2, 3], steps=4)
    alone = sample(pocket, [PROMPT], [2], steps=4)
    difference = np.asarray(together[1], int) - np.asarray(alone[0], int)
    assert np.abs(difference).max() <= 2


def test_guidance_zero_ignores_the_prompt(pocket):
    one, two = sample(pocket, [PROMPT, "a red car"], [1, 1], steps=3, guidance=0.0)
    assert np.abs(np.asarray(one, int) - np.asarray(two, int)).max() <= 2


def test_pngs_carry_parameters_in_a1111s_form(tmp_path):
    rite.generate(PROMPT, steps=2, negative="a dog", out=tmp_path / "a.png")
    text = Image.open(tmp_path / "a.png").text["parameters"]
    assert text.startswith(
        f"{PROMPT}\nNegative prompt: a dog\nSteps: 2, Sampler: DDIM, CFG scale: 3"
    )


def test_numbered_pictures_never_replace_files(tmp_path):
    rite.generate(PROMPT, steps=1, out=tmp_path)
    rite.generate(PROMPT, steps=1, out=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000.png", "00001.png"]


@pytest.mark.parametrize(
    ("item", "path", "weight"),
    [("a.safetensors", "a.safetensors", 1.0), ("a.safetensors:0.5", "a.safetensors", 0.5),
     ("C:/x.safetensors", "C:/x.safetensors", 1.0), ("b.safetensors:-1", "b.safetensors", -1.0)],
)  # fmt: skip
def test_an_adapter_item_is_a_file_and_a_weight(item, path, weight):
    assert split_weight(item) == (Path(path), weight)


def test_a_weight_out_of_range_is_refused():
    with pytest.raises(AdapterError, match="weight 50"):
        split_weight("a.safetensors:50")


def test_invalid_sizes_and_files_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="side 30 is not a multiple of 8"):
        rite.generate(PROMPT, width=30)
    with pytest.raises(ConfigError, match="one file for 2 pictures"):
        rite.generate(PROMPT, num=2, out=tmp_path / "a.png")
    (tmp_path / "file").write_text("x")
    with pytest.raises(RiteError, match="cannot write to"):
        rite.generate(PROMPT, out=tmp_path / "file" / "folder")


def test_grid_has_a_row_per_label():
    pictures = [[Image.new("RGB", (64, 64), c) for c in ("red", "blue")] for _ in range(3)]
    sheet = labelled_grid(pictures, ["one", "two", "a long label that wraps"], ["x"], cell=64)
    assert sheet.height == 48 + 3 * 72
    assert sheet.getpixel((200 + 32, 48 + 32)) == (255, 0, 0)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"seed": 2**64}, "seed 18446744073709551616 is not a whole number from 0"),
        ({"seed": 2**64 - 1, "num": 2}, "from 0 to 18446744073709551614"),
        ({"seed": -1}, "seed -1 is not"), ({"seed": 1.5}, "seed 1.5 is not"),
        ({"num": 0}, "0 pictures"), ({"steps": 0}, "0 steps"), ({"steps": 1001}, "1001 steps"),
        ({"guidance": NAN}, "guidance nan"), ({"guidance": INF}, "guidance inf"),
        ({"guidance": -1}, "guidance -1"), ({"width": 0}, "side 0"), ({"height": -8}, "side -8"),
        ({"height": 44}, "side 44"), ({"negative": "<lora:x:1>"}, "--adapter x.safetensors:1"),
        ({"regions": ["0,0,1,1: a [b::0.5]"]}, "would change"),
        ({"adapters": ["a.safetensors:nan"]}, "weight nan"),
        ({"adapters": ["a.safetensors:inf"]}, "weight inf"),
    ],
)  # fmt: skip
def test_invalid_numbers_are_refused_before_anything_is_written(tmp_path, settings, words):
    with pytest.raises(RiteError, match=re.escape(words)):
        rite.generate(PROMPT, **{"steps": 1, "out": tmp_path / "new"} | settings)
    assert not (tmp_path / "new").exists()


def test_the_largest_seed_draws(tmp_path):
    rite.generate(PROMPT, seed=2**64 - 1, steps=1, out=tmp_path / "a.png")
    assert read_parameters(tmp_path / "a.png").seed == 2**64 - 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"seeds": [0, 2**64]}, "seed 18446744073709551616"), ({"weights": [1, NAN]}, "weight nan"),
        ({"weights": [INF]}, "weight inf"), ({"steps": 0}, "0 steps"), ({"cell": 0}, "cells of 0"),
        ({"guidance": NAN}, "guidance nan"), ({"width": 0}, "side 0"),
        ({"negative": "a AND b"}, "AND"),
    ],
)  # fmt: skip
def test_a_sheet_refuses_invalid_numbers(tmp_path, pocket, settings, words):
    with pytest.raises(ConfigError, match=words):
        grid([PROMPT], base=pocket, out=tmp_path / "a.png", **{"steps": 1} | settings)
    assert not (tmp_path / "a.png").exists()


def test_statistics_refuse_invalid_numbers():
    for settings in ({"seed": 2**64}, {"seed": -1}, {"steps": 0}, {"pictures": 0}):
        with pytest.raises(ConfigError):
            Drawing(**settings)


def test_a_plus_in_a_file_name_is_part_of_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("cat+dog", "a", "b"):
        Path(f"{name}.safetensors").touch()
    cases = {
        "cat+dog.safetensors": ("cat+dog.safetensors",),
        "cat+dog.safetensors:0.5+a.safetensors": ("cat+dog.safetensors:0.5", "a.safetensors"),
        "a.safetensors+b.safetensors:2": ("a.safetensors", "b.safetensors:2"),
        "b.safetensors+missing.safetensors": ("b.safetensors", "missing.safetensors"),
        "": (),
    }
    for text, items in cases.items():
        values = {"prompt": ["x"], "adapter": [text], "weight": [1], "seed": [0]}
        sheet = plan_sheet(values | {"method": ["attached"]}, "seed")
        assert sheet.rows[0][0].adapter == items


def test_weights_without_effect_are_reported(adapters, tiny_folder, capsys):
    silent = load_adapter(adapters[0])
    pairs = [replace(pair, scale=0.0) for pair in silent.pairs]
    path = adapters[0].with_name("silent.safetensors")
    save_adapter(path, replace(silent, pairs=pairs))
    rite.generate("x", adapters=[path, f"{adapters[1]}:0"], base=str(tiny_folder), steps=1)
    told = capsys.readouterr().err
    assert f"silent.safetensors: {len(pairs)} of {len(pairs)} layers have no effect" in told
    assert "1.safetensors: its layers have no effect at weight 0" in told
