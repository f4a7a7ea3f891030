from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import rite_diffusion as rite
from rite_diffusion.adapters.choice import split_weight
from rite_diffusion.errors import AdapterError, ConfigError, RiteError
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


def test_pngs_carry_text_that_other_tools_read(tmp_path):
    rite.generate(PROMPT, steps=2, negative="a dog", out=tmp_path / "a.png")
    text = Image.open(tmp_path / "a.png").text["parameters"]
    assert text.startswith(
        f"{PROMPT}\nNegative prompt: a dog\nSteps: 2, Sampler: DDIM, CFG scale: 3"
    )


def test_pictures_never_overwrite_each_other(tmp_path):
    rite.generate(PROMPT, steps=1, out=tmp_path)
    rite.generate(PROMPT, steps=1, out=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000.png", "00001.png"]


@pytest.mark.parametrize(
    ("item", "path", "weight"),
    [("a.safetensors", "a.safetensors", 1.0), ("a.safetensors:0.5", "a.safetensors", 0.5),
     ("C:/x.safetensors", "C:/x.safetensors", 1.0), ("b.safetensors:-1", "b.safetensors", -1.0)],
)  # fmt: skip
def test_weights_follow_a_colon(item, path, weight):
    assert split_weight(item) == (Path(path), weight)


def test_a_weight_out_of_range_is_refused():
    with pytest.raises(AdapterError, match="weight 50"):
        split_weight("a.safetensors:50")


def test_sides_and_files_that_cannot_be(tmp_path):
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
