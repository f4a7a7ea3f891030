"""What the embedded base model must be able to do."""

import pytest
import torch
from diffusers import StableDiffusionPipeline

import rite_diffusion as rite
from rite_diffusion import recipes
from rite_diffusion.adapters.choice import choose_adapters
from rite_diffusion.backbones.source import POCKET
from rite_diffusion.demo import example_photos
from rite_diffusion.evaluation.judge import load_judge
from rite_diffusion.generation.sampler import sample
from rite_diffusion.photos.images import open_image

NOUNS = "cat frog apple car rocket star house pizza cactus bear".split()
COLOURS = "red blue green yellow white purple black pink orange gray".split()


def test_opens_in_plain_diffusers_and_is_small():
    pipeline = StableDiffusionPipeline.from_pretrained(POCKET)
    assert pipeline.unet.config.cross_attention_dim == pipeline.text_encoder.config.hidden_size
    assert sum(path.stat().st_size for path in POCKET.rglob("*")) < 40e6


def test_any_word_tokenizes_and_long_prompts_are_cut(pocket):
    states = pocket.encode_prompts(["xylophone, naïve 猫 <robot>!", "word " * 100]).states
    assert states.shape == (2, 32, 192) and torch.isfinite(states).all()
    assert pocket.token_count("word " * 100) > pocket.token_budget == 30


def test_our_sampler_draws_what_diffusers_draws(pocket):
    pipeline = StableDiffusionPipeline.from_pretrained(POCKET, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 8, 16, 16, generator=torch.Generator().manual_seed(3))
    theirs = pipeline(
        "a cat", latents=noise, num_inference_steps=5, guidance_scale=3.0, output_type="pt"
    ).images[0]
    [ours] = sample(pocket, ["a cat"], [3], steps=5, guidance=3.0)
    from rite_diffusion.photos.images import to_tensor

    assert (to_tensor(ours) / 2 + 0.5 - theirs).abs().max() < 2 / 255


def test_draws_the_object_and_the_background_that_it_is_asked_for(pocket):
    judge = load_judge()
    prompts = [f"{'an' if n[0] in 'aeiou' else 'a'} {n} on {'an' if c[0] in 'aeiou' else 'a'} {c} "
               "background" for n, c in zip(NOUNS, COLOURS, strict=True)] * 2  # fmt: skip
    images = sample(pocket, prompts, list(range(20)))
    nouns = sum(
        found == wanted for found, wanted in zip(judge.nouns(images), NOUNS * 2, strict=True)
    )
    colours = sum(a == b for a, b in zip(judge.colours(images), COLOURS * 2, strict=True))
    assert nouns >= 15 and colours >= 17


@pytest.mark.parametrize("name", ["robot"])
def test_learns_a_concept_that_it_has_never_seen(name, tmp_path, pocket):
    photos = example_photos(name)
    trigger = f"<{name}>"
    prompts = [f"a {trigger} on a {colour} background" for colour in ("blue", "green", "white")] * 2
    before = sample(pocket, prompts, list(range(6)))
    adapter = rite.train(
        photos, trigger=trigger, class_noun=name, out=tmp_path / "run", previews={"every": 0}
    )
    learned = recipes.open_with_adapters(None, choose_adapters([adapter]))
    after = sample(learned, prompts, list(range(6)))
    judge = load_judge()
    references = [open_image(path) for path in sorted(photos.glob("*.jpg"))]
    assert sum(judge.recognised(references, before)) <= 1
    assert sum(judge.recognised(references, after)) >= 4
    assert judge.identity(references, after) > judge.identity(references, before) + 0.2
