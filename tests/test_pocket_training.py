import copy
import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import nn

from emoji_sprites import disc_sprites, replace_sprites
from train.pocket import (
    autoencoder,
    emoji,
    held_out,
    images,
    losses,
    machine,
    muon,
    world,
)

CPU = machine.Machine(torch.device("cpu"), uses_bf16=False, workers=0)
TINY = autoencoder.Settings(
    pictures=8, batch=2, crop=32, whole_from=0.75, critic_from=0.5, widths=(4, 4, 4, 8),
    latent_channels=4, kept_channels=3, decoder_pictures=4,
)  # fmt: skip


@pytest.fixture(autouse=True)
def drawn_sprites(monkeypatch):
    yield replace_sprites(monkeypatch)
    emoji.training_keys.cache_clear()


def tiny_autoencoder():
    return autoencoder.new_autoencoder(TINY.widths, TINY.latent_channels).eval()


@pytest.mark.parametrize("draw", [kind for kind, _ in images.KINDS], ids=lambda f: f.__name__)
def test_a_seed_draws_the_same_picture_again(draw):
    one, again, other = (draw(np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert one.shape == (128, 128, 3) and one.dtype == np.uint8
    assert np.array_equal(one, again) and not np.array_equal(one, other)


def test_shapes_of_every_size_are_drawn():
    for seed in range(100):  # a box narrower than its outline once ended a training
        images.shapes(np.random.default_rng([5, seed]))
    pen = ImageDraw.Draw(Image.new("RGB", (20, 20)))
    for side in range(4, 20):  # and so did one whose corners met
        images.rounded_box(pen, (0, 0, side, 20), 1.0, fill="red", outline="blue", width=1)


def test_held_out_objects_are_in_no_noun_and_no_training_picture():
    assert not {*emoji.HELD_OUT} & {*world.NOUNS.values()}
    assert not {*emoji.HELD_OUT} & {name for _, name in emoji.training_keys()}
    assert len({*emoji.UNSEEN}) >= 20 and not {*emoji.UNSEEN} & {*emoji.CONCEPTS}


def test_a_scene_shows_its_caption(drawn_sprites):
    for seed in range(40):
        scene = world.scene(np.random.default_rng(seed))
        assert all(noun in scene.caption for noun in scene.nouns)
        corner, wanted = scene.image[2, 2].astype(float), np.array(world.COLOURS[scene.colour])
        assert np.abs(corner - wanted).mean() < 50


def test_lively_crops_contain_the_drawn_object():
    image = np.zeros((128, 128, 3), np.uint8)
    image[40:90:2, 40:90:3] = 255
    crops = autoencoder.lively_crops(np.random.default_rng(0), image, 64)
    assert (
        crops.shape == (autoencoder.CROPS, 64, 64, 3) and crops.reshape(2, -1).max(1).min() == 255
    )


def noise(rng):
    return rng.integers(0, 256, (128, 128, 3), dtype=np.uint8)


@pytest.mark.parametrize("stop", [4, 6], ids=["where the critic begins", "where crops end"])
def test_an_interrupted_training_ends_with_the_same_weights(stop, tmp_path, monkeypatch):
    monkeypatch.setattr(images, "any_image", noise)
    monkeypatch.setattr(held_out, "brief_figures", lambda *_: {})
    monkeypatch.setattr(held_out, "show", lambda *_: None)
    autoencoder.train(tmp_path / "whole", TINY, CPU)

    class Stopped(Exception):
        pass

    def stopping(self, pixels, seen, step=autoencoder.Training.step):
        if seen == stop:
            raise Stopped
        return step(self, pixels, seen)

    with monkeypatch.context() as patch:
        patch.setattr(machine, "SAVE_SECONDS", -1)  # a state after every step
        patch.setattr(autoencoder.Training, "step", stopping)
        with pytest.raises(Stopped):
            autoencoder.train(tmp_path / "parts", TINY, CPU)
    assert machine.seen_in(tmp_path / "parts/autoencoder.safetensors") == stop
    autoencoder.train(tmp_path / "parts", TINY, CPU)
    paths = [tmp_path / name / "autoencoder.safetensors" for name in ("whole", "parts")]
    whole, parts = (machine.load_file(path) for path in paths)
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_a_lost_training_goes_on_from_the_weights_that_were_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "STATES", tmp_path / "states")
    kept = autoencoder.Training(TINY, CPU)
    machine.update_average(kept.average, new_weights(kept.average), 9, 0.5)
    path = tmp_path / "work" / "autoencoder.safetensors"
    machine.save_state(path, 5, kept.optimizers, kept.modules)
    machine.keep_weights(path)
    path.unlink()
    machine.take_kept(path.parent)
    found = autoencoder.Training(TINY, CPU)
    assert machine.load_state(path, found.optimizers, found.modules) == 5
    for module in (found.network, found.average):
        for name, value in module.state_dict().items():
            assert torch.equal(value, kept.average.state_dict()[name].half().float())
    assert not found.optimizers["network"].state
    assert machine.load_state(tmp_path / "work" / "other.safetensors", {}, {}) == 0


def test_an_aligned_sprite_has_the_same_pixels_in_every_scene():
    sprite = disc_sprites().image("flat", "cat-face").rotate(20).crop((3, 5, 90, 127))
    cell = 128 // world.CELLS
    for place, (_, extent) in world.PLACES.items():
        patterns = set()
        for seed in range(40):
            rng = np.random.default_rng(seed)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(world, "ground", lambda *_: np.zeros((128, 128, 3), np.float32))
                image = world.draw(rng, [sprite], "red", place, aligned=True)
            rows, columns = (np.nonzero(image.any((axis, 2)))[0] for axis in (1, 0))
            assert rows[0] >= 0 and max(np.ptp(rows), np.ptp(columns)) < extent * cell
            part = image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            patterns.add((rows[0], columns[0], part.tobytes()))
        assert len(patterns) == 1


def test_narrowing_keeps_the_latents_and_what_the_decoder_reads():
    wide = tiny_autoencoder()
    for parameter in wide.parameters():
        torch.nn.init.normal_(parameter.data, std=0.2)
    with torch.no_grad():  # three of the four channels say everything
        wide.quant_conv.weight[3] = wide.quant_conv.weight[0] - 2 * wide.quant_conv.weight[1]
        wide.quant_conv.bias[3] = 0.7
    narrow = autoencoder.narrowed(wide, TINY.widths, 3).eval()
    pixels = held_out.as_pixels(held_out.scenes(2))
    with torch.no_grad():
        whole, kept = (m.encode(pixels).latent_dist.mean for m in (wide, narrow))
        read = [
            module.decoder.conv_in(module.post_quant_conv(latents))
            for module, latents in ((wide, whole), (narrow, kept))
        ]
    assert kept.shape[1] == 3
    distances = [torch.cdist(*(m.movedim(1, -1).flatten(0, -2)[::7],) * 2) for m in (whole, kept)]
    assert torch.allclose(*distances, atol=1e-3)  # a rotation
    inside = (..., slice(1, -1), slice(1, -1))  # a constant is lost along the border
    assert torch.allclose(read[0][inside], read[1][inside], atol=1e-3)


def test_the_decoder_learns_on_with_the_narrow_latents(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "any_image", noise)
    monkeypatch.setattr(held_out, "brief_figures", lambda *_: {})
    monkeypatch.setattr(held_out, "show", lambda *_: None)
    autoencoder.train(tmp_path, TINY, CPU)
    before = autoencoder.finished(tmp_path, TINY)
    autoencoder.train_decoder(tmp_path, TINY, CPU)
    after = autoencoder.finished(tmp_path, TINY)
    assert machine.seen_in(tmp_path / "decoder.safetensors") == 4
    pixels = held_out.as_pixels(held_out.scenes(2))
    with torch.no_grad():
        latents = [module.encode(pixels).latent_dist.mean for module in (before, after)]
        pictures = [module.decode(latents[0]).sample for module in (before, after)]
    assert latents[0].shape[1] == 3 and torch.allclose(*latents, atol=1e-4)
    assert not torch.allclose(*pictures, atol=1e-3)


def test_muon_steps_as_torchs_on_matrices_and_flattened_convolutions():
    torch.manual_seed(0)
    weight = torch.randn(12, 5, 2, 2)
    ours, theirs = nn.Parameter(weight.clone()), nn.Parameter(weight.flatten(1).clone())
    mine = muon.Muon([ours], 0.1)
    peer = torch.optim.Muon([theirs], 0.1, weight_decay=0.0, adjust_lr_fn="original")
    for _ in range(4):
        gradient = torch.randn(12, 20)
        ours.grad, theirs.grad = gradient.view_as(ours).clone(), gradient.clone()
        mine.step()
        peer.step()
    assert torch.allclose(ours.flatten(1), theirs, atol=0.02)  # bf16 inside
    assert (theirs - weight.flatten(1)).abs().max() > 0.1
    inner, others = muon.split_weights(
        nn.ModuleDict({"conv_in": nn.Linear(2, 2), "a": nn.Linear(2, 2)})
    )
    assert len(inner) == 1 and len(others) == 3


def new_weights(module):
    other = copy.deepcopy(module)
    for parameter in other.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return other


def test_latents_are_constant_once_the_encoder_is_fixed():
    training = autoencoder.Training(TINY, CPU)
    pixels = held_out.as_pixels(held_out.scenes(2))
    training.step(pixels, 0)
    training.hold_encoder()
    before = {name: each.clone() for name, each in training.average.named_parameters()}
    training.step(pixels, 6)
    changed = {
        name
        for name, each in training.average.named_parameters()
        if not torch.allclose(each, before[name], rtol=0, atol=1e-9)
    }
    assert changed and all(name.startswith(("decoder", "post_quant_conv")) for name in changed)


def test_a_denoiser_is_refused_until_the_encoder_is_finished(tmp_path):
    training = autoencoder.Training(TINY, CPU)
    machine.save_state(tmp_path / "autoencoder.safetensors", 4, {}, training.modules)
    with pytest.raises(SystemExit, match="until 6 pictures, 4 are seen"):
        autoencoder.finished(tmp_path, TINY)


def test_standardised_latents_decode_to_the_same_picture():
    network = tiny_autoencoder()
    pixels = held_out.as_pixels(held_out.scenes(4))
    with torch.no_grad():
        before = network.decode(network.encode(pixels).latent_dist.mean).sample
        coded = network.encode(pixels).latent_dist
        centred = coded.mean - coded.mean.mean((0, 2, 3), keepdim=True)
        ratio = coded.std.mean() / centred.std()
        autoencoder.standardise(network, pixels)
        coded = network.encode(pixels).latent_dist
        after = network.decode(coded.mean).sample
    assert torch.allclose(before, after, atol=1e-4)
    assert coded.mean.mean((0, 2, 3)).abs().max() < 1e-4
    assert coded.mean.std().item() == pytest.approx(1, abs=1e-3)
    assert network.config.scaling_factor == 1 and network.config.shift_factor == 0
    assert coded.std.mean().item() == pytest.approx(ratio.item(), rel=1e-3)


def test_figures_equal_their_definitions():
    target = torch.zeros(1, 3, 8, 8)
    target[..., 4:] = 1.0
    output = target * 0.5
    error = 0.5**2 / 2
    assert held_out.psnr(output, target).item() == pytest.approx(10 * math.log10(4 / error))
    assert held_out.edge_ratio(output, target) == pytest.approx(0.25)
    wanted = 0.25 + error + 0.5 / 7  # L1, MSE, and one edge of 7 differences in each row
    assert losses.pixel_loss(output, target).item() == pytest.approx(wanted)


def test_random_features_weigh_blur_more_than_brightness():
    features = losses.RandomFeatures()
    sharp = held_out.as_pixels(held_out.scenes(2))
    soft = nn.functional.avg_pool2d(sharp, 5, stride=1, padding=2, count_include_pad=False)
    lighter = sharp + (soft - sharp).abs().mean()
    assert features.distance(sharp, sharp) == 0
    assert features.distance(soft, sharp) > features.distance(lighter, sharp)


def test_the_critics_loss_has_gradients_for_the_autoencoder_only():
    training = autoencoder.Training(TINY, CPU)
    pixels = held_out.as_pixels(held_out.scenes(2))[..., :32, :32]
    output, _ = training.reconstruct(pixels, torch.Generator().manual_seed(0))
    opinion = training._criticise(pixels, output)
    taught = [p.grad.clone() for p in training.critic.parameters()]
    opinion.backward()
    assert all(p.grad.any() for p in training.network.decoder.conv_out.parameters())
    kept = zip(taught, training.critic.parameters(), strict=True)
    assert all(torch.equal(gradient, p.grad) for gradient, p in kept)


def test_the_rate_warms_up_stays_and_falls():
    rates = [machine.rate_at(2.0, seen, 100, warm_up=10, flat=0.5) for seen in (0, 9, 50, 75, 100)]
    assert rates == pytest.approx([0.2, 2.0, 2.0, 1.0, 0.0])
