"""What the embedded base model must be able to do."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

import rite_diffusion as rite
from rite_diffusion.adapters import load_adapter
from rite_diffusion.adapters.attach import attach
from rite_diffusion.api.demo import example_photos
from rite_diffusion.backbones.families import POCKET
from rite_diffusion.evaluation.judge import load_judge
from rite_diffusion.generation.denoise import sample
from rite_diffusion.photos.folder import read_folder
from rite_diffusion.types import Concept

NOUNS = (
    "cat dog tiger pig frog bear octopus crab butterfly ladybug "
    "sunflower rose mushroom carrot watermelon apple pizza car guitar tree"
).split()
COLOURS = "red blue green yellow white purple black pink orange gray".split()


CARD = Path(__file__).parents[1] / "docs" / "pocket-base.md"


@pytest.mark.parametrize(
    "dtype",
    ["", "dtype=torch.float32", "torch_dtype=torch.float32", "dtype=torch.bfloat16",
     "torch_dtype=torch.float16"],
)  # fmt: skip
def test_the_model_cards_code_draws_with_diffusers(dtype):
    [line] = re.findall(r"`diffusers\.(StableDiffusionPipeline\.from_pretrained\(.+?\))`",
                        CARD.read_text(encoding="utf-8"))  # fmt: skip
    line = line.replace('"rite_diffusion/backbones/pocket/weights"', "POCKET")
    pipeline = eval(line.replace("POCKET)", f"POCKET, {dtype})"))
    pipeline.set_progress_bar_config(disable=True)
    found = pipeline("a cat", num_inference_steps=2, output_type="np").images
    assert found.shape == (1, 64, 64, 3) and np.isfinite(found).all() and found.std() > 0.05
    wanted = getattr(torch, dtype.rpartition(".")[2] or "float32")
    parts = (pipeline.text_encoder, pipeline.unet, pipeline.vae)
    assert {part.dtype for part in parts} == {wanted}


def test_the_pocket_base_is_below_its_size_limit():
    assert sum(path.stat().st_size for path in POCKET.rglob("*")) < 40e6


def test_any_word_tokenizes_and_long_captions_are_cut(pocket):
    states = pocket.encode_captions(["xylophone, naïve 猫 <robot>!", "word " * 100]).states
    assert states.shape == (2, 32, 192) and torch.isfinite(states).all()
    assert pocket.token_count("word " * 100) > pocket.token_budget == 30


def test_sampling_equals_diffusers_pipeline(pocket):
    pipeline = StableDiffusionPipeline.from_pretrained(POCKET, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 8, 16, 16, generator=torch.Generator().manual_seed(3))
    theirs = pipeline(
        "a cat", latents=noise, num_inference_steps=5, guidance_scale=3.0, output_type="pt"
    ).images[0]
    [ours] = sample(pocket, ["a cat"], [3], steps=5, guidance=3.0)
    from rite_diffusion.photos.images import to_tensor

    assert (to_tensor(ours) / 2 + 0.5 - theirs).abs().max() < 2 / 255


def test_pocket_draws_the_prompted_object_and_background(pocket):
    grounds = COLOURS * 2
    article = lambda word: "an" if word[0] in "aeiou" else "a"  # noqa: E731
    pairs = zip(NOUNS, grounds, strict=True)
    prompts = [f"{article(n)} {n} on {article(c)} {c} background" for n, c in pairs]
    images = sample(pocket, prompts, list(range(20)))
    judge = load_judge()
    nouns, colours = judge.nouns(images), judge.colours(images)
    assert sum(a == b for a, b in zip(nouns, NOUNS, strict=True)) >= 15, nouns
    assert sum(a == b for a, b in zip(colours, grounds, strict=True)) >= 17, colours


def test_pocket_draws_both_objects_of_a_pair(pocket):
    pairs = list(zip(NOUNS[::2], NOUNS[1::2], strict=True))
    prompts = [f"a {a} on the left and a {b} on the right on a blue background" for a, b in pairs]
    images = sample(pocket, [prompt.replace("a o", "an o") for prompt in prompts], list(range(10)))
    found = load_judge().pairs(images)
    assert sum(a == b for a, b in zip(found, pairs, strict=True)) >= 6, found


@pytest.mark.slow  # a whole training of the preset
def test_pocket_learns_a_new_concept(pocket, tmp_path):
    photos = example_photos("robot")
    judge = load_judge()
    shown = [photo.image for photo in read_folder(photos, Concept("<r>", "robot"), ["a"]).photos]
    prompts = [f"a <robot> on a {colour} background" for colour in ("blue", "green", "white")] * 2
    before = sample(pocket, prompts, list(range(6)))
    path = rite.train(
        photos, trigger="<robot>", class_noun="robot", out=tmp_path / "run", previews={"every": 0}
    )
    attach(pocket, load_adapter(path), "robot")
    after = sample(pocket, prompts, list(range(6)))
    assert sum(judge.recognised(shown, before)) <= 1
    assert sum(judge.recognised(shown, after)) >= 4
    assert judge.identity(shown, after) > judge.identity(shown, before) + 0.2
