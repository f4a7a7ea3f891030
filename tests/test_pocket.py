"""What the embedded base model must be able to do."""

import torch
from diffusers import StableDiffusionPipeline

from rite_diffusion.backbones.source import POCKET
from rite_diffusion.evaluation.judge import load_judge
from rite_diffusion.generation.sampler import sample

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


def test_draws_the_background_that_it_is_asked_for(pocket):
    prompts = [f"a cat on {'an' if c[0] in 'aeiou' else 'a'} {c} background" for c in COLOURS] * 2
    images = sample(pocket, prompts, list(range(20)))
    found = load_judge().colours(images)
    assert sum(a == b for a, b in zip(found, COLOURS * 2, strict=True)) >= 17
