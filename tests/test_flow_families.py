"""Conformance of the flow-matching families: one more family is one more row of `PIPELINES`."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from flow_bases import SIDE, family, latents_of, opened
from flow_models import PIPELINES, flux, flux2_dev, klein, krea2, with_random_weights
from rite_diffusion.adapters.attach import detach, inject
from rite_diffusion.backbones.conditioning import KeptConditioning, joined
from rite_diffusion.backbones.protocols import Conditioning
from rite_diffusion.backbones.text_cache import cached_conditioning
from rite_diffusion.errors import ConfigError
from rite_diffusion.generation.denoise import denoising, guided
from rite_diffusion.photos.dataset import LatentSet
from rite_diffusion.training.batch import draw_batch
from rite_diffusion.training.loss import diffusion_loss

STEPS, SEED = 3, 5
PROMPT, NEGATIVE = "a cat on a blue background", "a dog"
INVERTED = ("z-image", "lumina2")  # told 1 - sigma, and the velocity is negative
FIXED = ("flux", "flux2", "sd3")  # padding counts, so a prompt always has the same length
PACKED = ("flux", "chroma", "qwen-image", "krea2")  # pipelines that take latents as tokens


@pytest.fixture(params=PIPELINES)
def base(request):
    return family(request.param)


# --- drawing -----------------------------------------------------------------------------------


def to_pipeline(name, latents):
    """Latents as the pipeline's `latents` argument takes them."""
    return F.pixel_unshuffle(latents, 2).flatten(2).mT if name in PACKED else latents


def from_pipeline(base, output):
    """Canonical latents of what the pipeline returns as `latent`."""
    cells = SIDE // base.pixels_per_latent
    if base.family in PACKED:
        return F.pixel_shuffle(output.mT.unflatten(2, (cells // 2, cells // 2)), 2)
    if base.family == "flux2":  # unpacked and denormalised, for the autoencoder
        norm, margin = base.vae.bn, base.vae.config.batch_norm_eps
        deviation = (norm.running_var.view(1, -1, 1, 1) + margin).sqrt()
        return (F.pixel_unshuffle(output, 2) - norm.running_mean.view(1, -1, 1, 1)) / deviation
    return output


def options_of(base, scale):
    """How the pipeline is asked for a guidance scale, and for a negative prompt."""
    pipeline = base.pipeline
    if base.family == "flux":
        return {"prompt": PROMPT, "guidance_scale": scale}
    if base.family == "flux2":
        states = base.encode([NEGATIVE]).states
        return {"prompt": PROMPT, "guidance_scale": scale, "negative_prompt_embeds": states}
    if base.family == "qwen-image":
        return {"prompt": PROMPT, "negative_prompt": NEGATIVE, "true_cfg_scale": scale}
    if base.family in ("z-image", "krea2"):  # cond + g (cond - uncond)
        return {"prompt": PROMPT, "negative_prompt": NEGATIVE, "guidance_scale": scale - 1}
    if base.family == "chroma":  # with masks of bool: diffusers issue 12116
        states, _, seen, others, _, others_seen = pipeline.encode_prompt(
            [PROMPT], [NEGATIVE], torch.device("cpu")
        )
        return {
            "prompt_embeds": states,
            "prompt_attention_mask": seen.bool(),
            "negative_prompt_embeds": others,
            "negative_prompt_attention_mask": others_seen.bool(),
            "guidance_scale": scale,
        }
    if base.family == "lumina2":  # the pipeline leaves its system prompt out of the negative one
        (states, seen, *_), (others, others_seen, *_) = (
            pipeline.encode_prompt(text, False) for text in (PROMPT, NEGATIVE)
        )
        return {
            "prompt_embeds": states,
            "prompt_attention_mask": seen,
            "negative_prompt_embeds": others,
            "negative_prompt_attention_mask": others_seen,
            "guidance_scale": scale,
        }
    return {"prompt": PROMPT, "negative_prompt": NEGATIVE, "guidance_scale": scale}


@torch.no_grad()
def test_our_sampler_draws_what_the_pipeline_draws(base):
    noise, scale = latents_of(base), 3.0
    draw = guided(base, [PROMPT], NEGATIVE, scale)
    *_, ours = denoising(base, draw, [SEED], steps=STEPS, width=SIDE, height=SIDE)
    base.pipeline.set_progress_bar_config(disable=True)
    output = base.pipeline(
        height=SIDE, width=SIDE, num_inference_steps=STEPS, output_type="latent",
        latents=to_pipeline(base.family, noise), **options_of(base, scale),
    ).images  # fmt: skip
    theirs = from_pipeline(base, output)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    plain = guided(base, [PROMPT], NEGATIVE, 1.0)
    *_, other = denoising(base, plain, [SEED], steps=STEPS, width=SIDE, height=SIDE)
    assert not torch.allclose(ours, other, atol=1e-3)


@torch.no_grad()
def test_our_decoder_is_the_pipelines(base):
    latents = latents_of(base)
    base.pipeline.set_progress_bar_config(disable=True)
    options = options_of(base, 1.5)
    noise = to_pipeline(base.family, latents)
    common = {"height": SIDE, "width": SIDE, "num_inference_steps": 2, "latents": noise}
    drawn = base.pipeline(output_type="pt", **common, **options).images
    kept = base.pipeline(output_type="latent", **common, **options).images
    ours = (base.decode(from_pipeline(base, kept)) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(ours, drawn.float(), rtol=0, atol=1e-4)


@torch.no_grad()
def test_latents_of_a_picture_are_scaled_as_those_that_are_decoded(base):
    """Encoding is decoding's scaling the other way round."""
    pixels = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1)) * 2 - 1
    raw = base.vae.encode(pixels.unsqueeze(2) if base.vae.config.get("z_dim") else pixels)
    decoded = base.vae.decode(raw.latent_dist.mode()).sample
    decoded = decoded[:, :, 0] if decoded.ndim == 5 else decoded
    torch.testing.assert_close(base.decode(base.encode_images(pixels)), decoded, atol=1e-4, rtol=0)


# --- an oracle ---------------------------------------------------------------------------------


def input_of(arguments, named):
    return named["hidden_states"] if "hidden_states" in named else arguments[0]


def time_of(arguments, named):
    return named["timestep"] if "timestep" in named else arguments[1]


def oracle(base, clean, monkeypatch):
    """The transformer knows the clean latents: it answers in its own convention."""
    seen = {}
    forward = base.transformer.forward

    def recording(*arguments, **named):
        seen["clean"] = input_of(arguments, named)
        return forward(*arguments, **named)

    conditioning = base.encode_prompts([PROMPT] * len(clean))
    monkeypatch.setattr(base.transformer, "forward", recording)
    base.denoise(clean, torch.full((len(clean),), 500.0), conditioning)

    def answer(*arguments, **named):
        noisy, times = input_of(arguments, named), time_of(arguments, named)
        if base.family in INVERTED:
            times = 1 - times
        times = times / 1000 if base.family == "sd3" else times
        sign = -1 if base.family in INVERTED else 1
        count = len(noisy) // len(seen["clean"])
        goals = list(seen["clean"]) * count
        velocities = [
            sign * (one - goal) / time for one, goal, time in zip(noisy, goals, times, strict=True)
        ]
        return (velocities if isinstance(noisy, list) else torch.stack(velocities),)

    monkeypatch.setattr(base.transformer, "forward", answer)


@torch.no_grad()
def test_an_oracles_velocity_leads_to_the_picture(base, monkeypatch):
    clean = latents_of(base, seed=9)
    oracle(base, clean, monkeypatch)
    draw = guided(base, [PROMPT], "", 1.0)
    *_, latents = denoising(base, draw, [SEED], steps=STEPS, width=SIDE, height=SIDE)
    torch.testing.assert_close(latents, clean, rtol=0, atol=1e-5)


@torch.no_grad()
def test_an_oracle_has_no_loss(base, monkeypatch):
    clean = latents_of(base, count=1, seed=9)
    oracle(base, clean.expand(4, -1, -1, -1), monkeypatch)
    data = LatentSet([clean[0]], None, [0] * 4, ["a cat"] * 4, [1.0] * 4, ["a"] * 4)
    batch = draw_batch(base, data, 0, size=4)
    assert diffusion_loss(base, batch).item() < 1e-6
    assert batch.noise.std() > 0.5


# --- noise levels ------------------------------------------------------------------------------


def test_levels_are_shifted_by_the_schedulers_own_line():
    places, cells = torch.tensor([0.0, 0.25, 0.5, 0.9]), (128, 128)
    found = {name: family(name).noise_schedule.levels(places, cells) for name in PIPELINES}
    tokens = 64 * 64
    slopes = {  # s at 1024 x 1024: of the schedulers' lines of mu, or static
        "z-image": 3.0, "sd3": 3.0, "lumina2": 6.0, "chroma": 1.0,
        "flux": torch.tensor(1.15).exp().item(),
        "qwen-image": torch.tensor(0.5 + 0.4 * (tokens - 256) / (8192 - 256)).exp().item(),
        "krea2": torch.tensor(0.5 + 0.65 * (tokens - 256) / (6400 - 256)).exp().item(),
    }  # fmt: skip
    for name, s in slopes.items():
        sigma = s * places / (1 + (s - 1) * places)
        torch.testing.assert_close(found[name].sigma, sigma)
        torch.testing.assert_close(found[name].signal, 1 - sigma)
        torch.testing.assert_close(found[name].times, 1000 * sigma)
    flux2 = family("flux2").noise_schedule.levels(places, (64, 64))  # cells of 16 pixels
    torch.testing.assert_close(flux2.sigma, found["flux"].sigma)
    given = family("flux").noise_schedule.levels(places, cells, shift=2.0)
    torch.testing.assert_close(given.sigma, 2 * places / (1 + places))


# --- text --------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_prompt_in_a_batch_equals_itself_alone(base):
    short, long = "a cat", "a small red cat on the left on a blue background beside a big dog"
    noisy, times = latents_of(base, count=2), torch.tensor([300.0, 700.0])
    both = base.denoise(noisy, times, base.encode_prompts([short, long]))
    for row, prompt in enumerate((short, long)):
        alone = base.encode_prompts([prompt])
        one = base.denoise(noisy[row : row + 1], times[row : row + 1], alone)
        torch.testing.assert_close(both[row : row + 1], one, rtol=1e-4, atol=2e-5)
    lengths = {base.encode_prompts([each]).states.shape[1] for each in (short, long)}
    if base.family in FIXED:
        assert lengths == {base.tokens + (77 if base.family == "sd3" else 0)}  # CLIP's before T5's


@torch.no_grad()
def test_captions_of_the_cache_equal_fresh_ones(base, tmp_path):
    texts = ["a cat", "a big dog on a red background"]
    for _ in range(2):  # encoded, then read
        kept = joined([cached_conditioning(base, text, tmp_path) for text in texts])
    fresh = base.encode_captions(texts)
    noisy, times = latents_of(base, count=2), torch.tensor([300.0, 700.0])
    ours, theirs = (base.denoise(noisy, times, each) for each in (kept, fresh))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)


def test_kept_conditioning_is_bounded_by_its_bytes():
    asked = []

    def encode(prompt):
        asked.append(prompt)
        return Conditioning(torch.zeros(1, 4, 4), {"pooled": torch.zeros(1, 4)})  # 80 bytes

    cpu = torch.device("cpu")
    kept = KeptConditioning(encode, 170, cpu)
    for prompt in ("a", "b", "a", "c", "a", "b"):  # c takes the place of b
        kept(prompt)
    assert asked == ["a", "b", "c", "b"]
    one = KeptConditioning(encode, 10, cpu)
    assert one("x").states is one("x").states  # the last one stays whatever its size
    assert asked[4:] == ["x"]
    elsewhere = KeptConditioning(encode, 170, torch.device("meta"))  # stands in for a GPU
    assert {elsewhere("a").states.device.type for _ in range(2)} == {"meta"}
    assert asked[5:] == ["a"] and elsewhere._kept["a"].states.device == cpu


def test_a_budget_of_tokens_is_what_the_encoder_keeps(base):
    """A caption as long as the budget is read to its end, a longer one is not."""
    word = "cat "
    count = base.token_budget // base.token_count(word)
    ends = ["dog", "bus"]
    kept, lost = (
        [base.encode_prompts([word * (count - free) + end]) for end in ends] for free in (1, -40)
    )
    assert not torch.equal(kept[0].states, kept[1].states)
    assert torch.equal(lost[0].states, lost[1].states)


def test_what_needs_cross_attention_is_refused(base):
    with pytest.raises(ConfigError, match="has no cross-attention"):
        base.token_positions("a cat", "cat")


# --- training ----------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_every_target_gets_a_gradient(base, checkpointing):
    paths = base.lora_targets("transformer", blocks=True)
    assert len(paths) > len(base.lora_targets("transformer")) > 0
    inject(base, "it", {"transformer": paths}, 2, 2)
    base.checkpoint_gradients(checkpointing)
    try:
        conditioning = base.encode_captions(["a cat", "a dog"])
        output = base.denoise(latents_of(base, 2), torch.tensor([300.0, 700.0]), conditioning)
        output.square().mean().backward()
        ups = {n: p for n, p in base.transformer.named_parameters() if "lora_B" in n}
        assert len(ups) == len(paths)
        idle = [n for n, p in ups.items() if p.grad is None or not p.grad.abs().max() > 0]
        assert not idle
    finally:
        base.checkpoint_gradients(False)
        detach(base, "it")


def test_layers_without_effect_are_no_targets(base):
    """Every attention projection of the blocks is a target, or its output changes no picture."""
    left = {
        path
        for path, module in base.transformer.named_modules()
        if path.startswith(base.block_prefixes)
        and path.endswith(
            tuple(f".{each}" for each in (*base.attention_layers, *base.other_layers))
        )
        and isinstance(module, torch.nn.Linear)
    } - set(base.lora_targets("transformer", blocks=True))
    conditioning = base.encode_captions(["a cat"])
    noisy, times = latents_of(base), torch.tensor([300.0])
    with torch.no_grad():
        before = base.denoise(noisy, times, conditioning)
        for path in left:
            weight = base.transformer.get_submodule(path).weight
            kept = weight.clone()
            weight.normal_()
            assert torch.equal(base.denoise(noisy, times, conditioning), before)
            weight.copy_(kept)
    assert bool(left) == (base.family in ("qwen-image", "sd3"))


# --- variants ----------------------------------------------------------------------------------


def test_distilled_models_say_what_to_train_on():
    assert not family("flux").support.distilled
    for pipeline, words in (
        (flux(guidance=False), "FLUX.1-dev"),
        (klein(distilled=True), "FLUX.2-klein-base"),
        (krea2(distilled=True), "Krea 2 Raw"),
    ):
        distilled = opened(pipeline)
        assert words in distilled.support.distilled
        assert distilled.guidance.kind == "none"


@torch.no_grad()
def test_embedded_guidance_is_told_once_and_not_combined():
    base = opened(with_random_weights(flux2_dev()))
    calls = []
    forward = base.transformer.forward

    def recording(**named):
        calls.append(named["guidance"])
        return forward(**named)

    base.transformer.forward = recording
    states = torch.randn(1, 7, 48, generator=torch.Generator().manual_seed(0))
    base.encode = lambda prompts: SimpleNamespace(states=states[: len(prompts)], extra={})
    draw = guided(base, [PROMPT], "", 2.5)
    list(denoising(base, draw, [SEED], steps=2, width=SIDE, height=SIDE))
    assert [call.tolist() for call in calls] == [[2.5], [2.5]]
    base.denoise(latents_of(base), torch.tensor([300.0]), base.encode_captions(["a cat"]))
    assert calls[-1].tolist() == [1.0]  # while training
