import copy
import shutil

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from emoji_sprites import replace_sprites
from train.pocket import autoencoder, bases, canvas, denoiser, emoji, held_out, machine, text, world

CPU = machine.Machine(torch.device("cpu"), uses_bf16=False, workers=0)
SIZES = bases.Sizes(unet_widths=(16, 16, 16), width=32, layers=1, text_width=32, text_layers=1)


@pytest.fixture(autouse=True)
def drawn_sprites(monkeypatch):
    yield replace_sprites(monkeypatch)
    emoji.training_keys.cache_clear()


def tiny_autoencoder():
    return autoencoder.new_autoencoder((4, 4, 4, 8), 4).eval()


def test_patches_are_rows_of_two_by_two_latents():
    latents = torch.randn(3, 4, 16, 16)
    found = canvas.patches(latents)
    assert found.shape == (3, canvas.PATCHES, 16)
    for row, column in ((0, 0), (2, 5), (7, 7)):
        part = latents[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        assert torch.equal(found[:, 8 * row + column], part.flatten(1))


def test_the_canvas_shows_the_scene_of_a_caption(tmp_path, monkeypatch):
    monkeypatch.setattr(world, "NOUNS", {"cat": "cat-face", "dog": "dog-face"})
    coder = tiny_autoencoder()
    table = canvas.table(tmp_path, coder, CPU)
    assert table.shape == (2, len(world.PLACES), len(world.COLOURS), 4, 16, 16)
    sprites = [emoji.sprites().image("3d", name) for name in world.NOUNS.values()]

    def coded(shown, colour, place):
        picture = world.draw(None, shown, colour, place, aligned=True)
        assert np.array_equal(picture[0, 0], world.COLOURS[colour])
        with torch.no_grad():
            return coder.encode(held_out.as_pixels(picture[None])).latent_dist.mean[0]

    single = world.Description("a small dog", ("dog",), "blue", "small", "3d")
    wanted = coded(sprites[1:], "blue", "small")
    assert torch.allclose(canvas.latents_of(single, table), wanted, atol=1e-3)
    pair = world.Description("a dog and a cat", ("dog", "cat"), "red", "pair", "3d")
    found = canvas.latents_of(pair, table)
    for half, sprite, place in ((slice(0, 8), 1, "left"), (slice(8, 16), 0, "right")):
        wanted = coded([sprites[sprite]], "red", place)[..., half]
        assert torch.allclose(found[..., half], wanted, atol=1e-3)


def test_scene_facts_match_the_caption():
    pair = world.Description("a cat and an ant", ("cat", "ant"), "red", "pair", "3d")
    single = world.Description("a small cat on a blue background", ("cat",), "blue", "small", "3d")
    nouns = list(world.NOUNS)
    assert text.facts_of(pair) == [nouns.index("cat"), nouns.index("ant") + 1, 0, 0, 0]
    assert text.facts_of(single) == [nouns.index("cat"), 0, 5, 1, 0]
    assert all(
        fact < size for fact, size in zip(text.facts_of(single), text.fact_sizes(), strict=True)
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Both bases, tiny and untrained, with their folder."""
    folder = tmp_path_factory.mktemp("bases")
    keys = {("3d", name): (0, 1, 1) for name in world.NOUNS.values()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(emoji, "sprites", lambda: emoji.Sprites(np.zeros((1, 1, 1, 4)), keys))
        emoji.training_keys.cache_clear()
        return folder, {n: base(folder, 4, SIZES, CPU) for n, base in bases.BASES.items()}


@pytest.mark.parametrize("name", bases.BASES)
def test_every_caption_fits_the_text_encoder(made, name):
    base = made[1][name]
    longest = max(text.captions(2000), key=len)
    states = base.states([longest, "a cat", ""])
    taught = base.taught_states([longest, "a cat"])
    assert len(states) == 3 and {*taught.owners.tolist()} == {0, 1}
    assert taught.picture.shape == (2, canvas.PATCHES, 32)
    assert max(len(state) for state in states) <= text.TOKENS
    shown = torch.stack([state[-canvas.PATCHES :] for state in states[:2]])
    assert torch.allclose(taught.picture, shown.float(), atol=0.01)  # what the denoiser reads
    words = base.tokenizer.decode(base.tokenizer(longest).input_ids)
    assert longest.split()[-1] in words


@pytest.mark.parametrize("name", bases.BASES)
def test_a_text_encoder_learns_what_a_scene_looks_like(made, name, tmp_path):
    base = made[1][name]
    encoder = copy.deepcopy(base.text_encoder)
    picture = torch.randn(1, 1, 1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    counts = (len(world.NOUNS), len(world.PLACES), len(world.COLOURS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "text_encoder", encoder)
        table = picture.expand(*counts, -1, -1, -1)
        path = tmp_path / "text.safetensors"
        _, error = text.teach(encoder, base.taught_states, table, CPU, 1600, path, batch=16)
        learned = copy.deepcopy(encoder.state_dict())
        text.teach(encoder, base.taught_states, table, CPU, 1600, path, batch=16)
    assert all(torch.equal(value, learned[key]) for key, value in encoder.state_dict().items())
    assert error < 0.7 * picture.var()  # the mean patch alone leaves all of it


def test_the_log_tells_errors_with_and_without_captions():
    noises = []

    class Fake:
        def errors(self, latents, states, generator):
            noises.append(torch.randn(3, generator=generator))
            return torch.stack(states).mean(1) * latents.mean((1, 2, 3))

    latents = torch.full((2, 1, 2, 2), 2.0)
    found = denoiser.use_of_captions(Fake(), latents, [torch.ones(4)] * 2, torch.full((4,), 3.0))
    assert found == {"told": 2.0, "untold": 6.0}
    assert torch.equal(*noises)


@pytest.mark.parametrize("name", bases.BASES)
def test_a_perfect_denoiser_has_zero_error(made, name, monkeypatch):
    base, latents = made[1][name], torch.randn(6, 4, 16, 16)

    class Answer:
        def __init__(self, sample):
            self.sample = sample

    def unet(noisy, timesteps, context):
        signal = base.schedule.alphas_cumprod[timesteps].sqrt()[:, None, None, None]
        sigma = (1 - signal**2).sqrt()
        noise = (noisy - signal * latents) / sigma
        return Answer(signal * noise - sigma * latents)

    def transformer(noisy, times, context):
        sigma = (1 - times)[:, None, None, None]
        noise = (torch.stack(noisy).squeeze(2) - (1 - sigma) * latents) / sigma
        return Answer(list((latents - noise).unsqueeze(2)))

    monkeypatch.setitem(base.__dict__, "denoiser", {"unet": unet, "flow": transformer}[name])
    states = base.states(["a cat"] * 6)
    assert base.errors(latents, states, torch.Generator().manual_seed(0)).max() < 1e-3


@pytest.mark.parametrize("name", bases.BASES)
def test_plain_diffusers_opens_and_draws_what_was_trained(made, name, tmp_path, monkeypatch):
    settings = denoiser.Settings(
        pictures=4, scenes=4, captions=4, batch=2, unet_widths=(16, 16, 16), width=32, layers=1,
        text_width=32, text_layers=1,
    )  # fmt: skip
    folder = tmp_path / "work"
    shutil.copytree(made[0], folder)  # with the tokenizers
    monkeypatch.setattr(denoiser, "SHEET", denoiser.SHEET[:2])
    denoiser.train(folder, name, tiny_autoencoder(), settings, CPU)
    pipeline = DiffusionPipeline.from_pretrained(folder / name, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(["a cat", "an ant"], num_inference_steps=2, height=128, width=128).images
    assert [image.size for image in drawn] == [(128, 128)] * 2
    assert Image.open(folder / f"{name}-sheet.png").size == (6 * 128, 2 * 128)
    assert machine.seen_in(folder / f"{name}.safetensors") == 4


def test_flow_levels_follow_the_shifted_logit_normal(made):
    base, seen = made[1]["flow"], []

    def transformer(noisy, times, context):
        seen.append(1 - times)
        return type("Answer", (), {"sample": noisy})()

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(base.__dict__, "denoiser", transformer)
        states = base.states(["a cat"]) * 4000
        base.errors(torch.zeros(4000, 4, 2, 2), states, torch.Generator().manual_seed(0))
    sigma = seen[0]
    normal = torch.logit(sigma / (3 - 2 * sigma))  # a shift of 3, undone
    assert normal.mean().item() == pytest.approx(0, abs=0.01)
    assert normal.std().item() == pytest.approx(1, abs=0.01)
