from contextlib import contextmanager

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetPipeline,
    T2IAdapter,
)
from PIL import Image

import rite_diffusion as rite
from models import tiny_stable_diffusion
from rite_diffusion.errors import BackboneError, ConfigError
from rite_diffusion.generation.control import load_controls, parse_control, under_control
from rite_diffusion.generation.denoise import denoising, guided, initial_noise, sample
from rite_diffusion.generation.metadata import read_parameters
from rite_diffusion.generation.picture import draw_picture, resolve_request
from rite_diffusion.generation.request import PictureRequest

PROMPT, NEGATIVE, STEPS, GUIDANCE, SEED = "a red cat", "dark", 2, 3.0, 7


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """Folders of random networks for the tiny base; the ControlNet `silent` is fresh."""
    folder = tmp_path_factory.mktemp("networks")
    torch.manual_seed(0)
    net = ControlNetModel.from_unet(tiny_stable_diffusion().unet, conditioning_channels=3)
    net.save_pretrained(folder / "silent")
    for parameter in net.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    net.save_pretrained(folder / "net")
    T2IAdapter(channels=[32, 64, 64, 64], num_res_blocks=1).save_pretrained(folder / "adapter")
    T2IAdapter(in_channels=1, channels=[32, 64, 64, 64], num_res_blocks=1).save_pretrained(
        folder / "sketch"
    )
    return folder


@pytest.fixture
def pose(tmp_path):
    """A condition picture of the size that the tiny base draws."""
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "pose.png")
    return tmp_path / "pose.png"


def drawn(backbone, *conditions):
    """Final latents under the conditions."""
    controls = load_controls(backbone, [parse_control(text) for text in conditions], 64, 64)
    plain = guided(backbone, [PROMPT], NEGATIVE, GUIDANCE)
    predict = under_control(plain, backbone, controls, [PROMPT, NEGATIVE])
    *_, latents = denoising(backbone, predict, [SEED], steps=STEPS)
    return latents


def reference(kind, backbone, tiny_folder, image, network, **options):
    """Latents of diffusers' own pipeline, from the same noise."""
    part = "controlnet" if kind is StableDiffusionControlNetPipeline else "adapter"
    pipeline = kind.from_pretrained(tiny_folder, safety_checker=None, **{part: network})
    pipeline.scheduler = backbone.sampler(STEPS, (8, 8))
    pipeline.set_progress_bar_config(disable=True)
    noise = initial_noise(backbone, [SEED], 64, 64)
    return pipeline(
        PROMPT, image=image, negative_prompt=NEGATIVE, num_inference_steps=STEPS,
        guidance_scale=GUIDANCE, latents=noise, output_type="latent", **options,
    ).images  # fmt: skip


def test_a_controlnet_acts_as_in_diffusers(tiny, tiny_folder, networks, pose):
    ours = drawn(tiny, f"{networks / 'net'}={pose}:0.7")
    theirs = reference(
        StableDiffusionControlNetPipeline, tiny, tiny_folder, Image.open(pose),
        ControlNetModel.from_pretrained(networks / "net"), controlnet_conditioning_scale=0.7,
    )  # fmt: skip
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    assert (ours - drawn(tiny)).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["adapter", "sketch"])
def test_a_t2i_adapter_acts_as_in_diffusers(name, tiny, tiny_folder, networks, pose):
    picture = Image.open(pose)
    if name == "sketch":  # of one channel
        mean = np.asarray(picture, np.float32).mean(-1)
        condition = torch.from_numpy(mean / 255)[None, None]
    else:
        condition = picture
    ours = drawn(tiny, f"{networks / name}={pose}:0.7")
    theirs = reference(
        StableDiffusionAdapterPipeline, tiny, tiny_folder, condition,
        T2IAdapter.from_pretrained(networks / name), adapter_conditioning_scale=0.7,
    )  # fmt: skip
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    assert (ours - drawn(tiny)).abs().max() > 1e-3


def test_a_fresh_controlnet_changes_nothing(tiny, networks, pose):
    assert torch.equal(drawn(tiny, f"{networks / 'silent'}={pose}"), drawn(tiny))


def test_several_conditions_add_up_and_restore_the_denoiser(tiny, networks, pose):
    before = sample(tiny, ["a cat"], [1], steps=2)
    texts = [f"{networks / 'net'}={pose}", f"{networks / 'adapter'}={pose}"]
    both = drawn(tiny, *texts)
    assert all((both - drawn(tiny, text)).abs().max() > 1e-3 for text in texts)
    assert torch.equal(
        drawn(tiny, f"{texts[0]}:1", f"{networks / 'silent'}={pose}"), drawn(tiny, texts[0])
    )
    assert np.array_equal(
        np.asarray(before[0]), np.asarray(sample(tiny, ["a cat"], [1], steps=2)[0])
    )


@contextmanager
def counted(module):
    """A list that grows by one entry for each call of the module."""
    calls = []
    handle = module.register_forward_hook(lambda *_: calls.append(1))
    try:
        yield calls
    finally:
        handle.remove()


def test_the_text_encoder_runs_once_for_each_batch_of_prompts(tiny, networks, pose):
    condition = f"{networks / 'net'}={pose}"
    with counted(tiny.text_encoder) as calls:
        drawn(tiny, condition)
    assert len(calls) == 1  # [negative prompt, prompt]
    request = PictureRequest(
        prompt="a park", regions=["0,0,0.5,1: a cat"], controls=[condition], steps=1
    )
    controls = load_controls(tiny, [parse_control(condition)], 64, 64)
    with counted(tiny.text_encoder) as calls:
        draw_picture(tiny, resolve_request(tiny, request), controls=controls)
    assert len(calls) == 2  # the picture's batch and the region's


def test_conditions_and_regions_go_together(tiny_folder, networks, pose, tmp_path):
    settings = {"base": str(tiny_folder), "steps": 2, "seed": 1, "out": tmp_path / "a.png"}
    [plain] = rite.generate("a park", regions=["0,0,0.5,1: a cat"], **settings)
    [ours] = rite.generate(
        "a park", regions=["0,0,0.5,1: a cat"], controls=[f"{networks / 'net'}={pose}"], **settings
    )
    assert not np.array_equal(np.asarray(plain), np.asarray(ours))
    [told] = read_parameters(tmp_path / "a.png").controls
    assert told.startswith("net=pose.png:1 (") and str(tmp_path) not in told


@pytest.mark.parametrize(
    ("text", "words"),
    [("net", "is not"), ("net=", "is not"), ("=a.png", "is not"), ("net={text}", "not a picture"),
     ("net=nowhere.png", "no good"), ("net={pose}:3", "at most 2"), ("net={pose}:0", "above 0")],
)  # fmt: skip
def test_invalid_conditions_are_refused(text, words, pose, tmp_path):
    (tmp_path / "a.txt").write_text("no picture")
    with pytest.raises(ConfigError, match=words):
        parse_control(text.format(pose=pose, text=tmp_path / "a.txt"))


def test_control_networks_of_another_family_are_refused(tiny, networks, pose, tmp_path):
    T2IAdapter(channels=[32, 32, 32, 32], num_res_blocks=1).save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigError, match="choose a network for this kind of base"):
        drawn(tiny, f"{tmp_path / 'other'}={pose}")
    (tmp_path / "empty").mkdir()
    for source in (tmp_path / "empty", networks / "nowhere"):
        with pytest.raises(BackboneError, match="no ControlNet or T2I-Adapter"):
            drawn(tiny, f"{source}={pose}")
    (tmp_path / "empty" / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    with pytest.raises(BackboneError, match="it is a UNet2DConditionModel"):
        drawn(tiny, f"{tmp_path / 'empty'}={pose}")
