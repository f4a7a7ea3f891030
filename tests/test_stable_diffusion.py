"""The same code on a model of Stable Diffusion 1.5's shape, from a folder and from one file."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import rite_diffusion as rite
from models import true_stable_diffusion_15
from reference.ldm_layout import ldm_state_dict
from rite_diffusion.backbones.source import load_backbone
from rite_diffusion.errors import AdapterError, BackboneError

SETTINGS = {"steps": 2, "batch": 2, "precision": "fp32", "previews": {"every": 0}}


@pytest.fixture(scope="module")
def tiny_file(tmp_path_factory, tiny_folder):
    from diffusers import StableDiffusionPipeline

    path = tmp_path_factory.mktemp("single") / "tiny.safetensors"
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None)
    save_file(ldm_state_dict(pipeline), path)
    return path


@pytest.mark.parametrize("source", ["folder", "file"])
def test_trains_and_generates_from_folder_and_single_file(
    source, tiny_folder, tiny_file, photos, tmp_path
):
    base = str(tiny_folder if source == "folder" else tiny_file)
    adapter = rite.train(
        photos,
        trigger="<thing>",
        class_noun="toy",
        base=base,
        out=tmp_path / "run",
        resolution=64,
        **SETTINGS,
    )
    info = rite.inspect(adapter)
    assert info.info.base in ("tiny-sd", "tiny.safetensors")
    assert len(info.pairs) > 40
    [image] = rite.generate(
        "a <thing>", adapters=[adapter], base=base, steps=2, width=64, height=64
    )
    with pytest.raises(AdapterError, match="pass its path as --base"):
        rite.generate("a <thing>", adapters=[adapter])
    assert image.size == (64, 64) and np.asarray(image).std() > 0


def test_folder_and_file_are_the_same_model(tiny_folder, tiny_file):
    one, two = load_backbone(str(tiny_folder)), load_backbone(str(tiny_file))
    assert one.fingerprint == two.fingerprint
    assert one.prediction_type == two.prediction_type == "epsilon"
    noisy, step = torch.randn(1, 4, 8, 8), torch.tensor([300])
    with torch.no_grad():
        first, second = (m.denoise(noisy, step, m.encode_prompts(["a cat"])) for m in (one, two))
    torch.testing.assert_close(first, second)


@pytest.mark.parametrize(
    ("base", "words"),
    [
        ("poket", "no base model 'poket'.*Pass 'pocket'"),
        ("/nowhere/model", "no base model"),
        ("model.ckpt", "is a pickle"),
        ("nobody/nothing-at-all", "neither here nor on the hub"),
    ],
)
def test_a_missing_base_is_refused_with_a_remedy(base, words):
    with pytest.raises(BackboneError, match=words):
        load_backbone(base)


def test_a_folder_that_is_not_a_model_is_refused(tmp_path):
    with pytest.raises(BackboneError, match="no model_index.json"):
        load_backbone(str(tmp_path))


@pytest.mark.full_size
def test_trains_and_generates_at_true_size(photos, tmp_path):
    folder = tmp_path / "sd15"
    true_stable_diffusion_15().save_pretrained(folder)
    adapter = rite.train(
        photos,
        trigger="<thing>",
        class_noun="toy",
        base=str(folder),
        out=tmp_path / "run",
        resolution=128,
        **SETTINGS,
    )
    assert len(rite.inspect(adapter).pairs) == 16 * 8 + 12 * 4
    [image] = rite.generate(
        "a <thing>", adapters=[adapter], base=str(folder), steps=2, width=128, height=128
    )
    assert image.size == (128, 128)
