"""Stable Diffusion 2.x and XL behind the same protocol, and which bases are one and the same."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

import rite_diffusion as rite
from rite_diffusion.adapters.attach import OTHER_BASE_BITS
from rite_diffusion.backbones.fingerprint import fingerprint
from rite_diffusion.backbones.source import load_backbone
from rite_diffusion.errors import AdapterError, BackboneError
from rite_diffusion.methods import PlainLora
from rite_diffusion.training.settings import configure

SETTINGS = {"steps": 2, "batch": 2, "precision": "fp32", "previews": {"every": 0}}


@pytest.mark.parametrize("name", ["tiny_folder_2", "tiny_folder_xl"])
def test_trains_and_generates_with_every_family(name, request, photos, tmp_path, tiny_folder):
    base = str(request.getfixturevalue(name))
    adapter = rite.train(
        photos, trigger="<thing>", class_noun="toy", base=base, out=tmp_path / "run",
        resolution=64, **SETTINGS,
    )  # fmt: skip
    found = rite.inspect(adapter)
    components = {pair.name.partition("_te")[1] + pair.name[:8] for pair in found.pairs}
    assert len(components) == (3 if name == "tiny_folder_xl" else 2)
    assert any(pair.up.abs().max() > 0 for pair in found.pairs if "lora_te" in pair.name)
    one = {"steps": 2, "width": 64, "height": 64}
    [image] = rite.generate("a <thing>", adapters=[adapter], base=base, **one)
    assert image.size == (64, 64) and np.asarray(image).std() > 0
    with pytest.raises(AdapterError, match=r"'tiny-sd(2|xl)'.*tiny-sd.*--other-base"):
        rite.generate("a <thing>", adapters=[adapter], base=str(tiny_folder), **one)
    kind = StableDiffusionXLPipeline if name == "tiny_folder_xl" else StableDiffusionPipeline
    pipeline = kind.from_pretrained(base)
    pipeline.load_lora_weights(str(adapter.parent), weight_name=adapter.name, use_safetensors=True)
    assert len(pipeline.get_active_adapters()) == 1


@torch.no_grad()
@pytest.mark.parametrize("prompt", ["a red cat", ""])
def test_sdxl_gets_the_same_extra_conditioning_as_in_diffusers(tiny_folder_xl, prompt):
    backbone = load_backbone(str(tiny_folder_xl))
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_folder_xl)
    noisy, step = torch.randn(2, 4, 8, 16), torch.tensor([300])
    states, negative, pooled, negative_pooled = pipeline.encode_prompt(prompt, device="cpu")
    if not prompt:  # which means no condition, as its `negative_prompt=None`
        states, pooled = negative, negative_pooled
    sizes = torch.tensor([[64, 128, 0, 0, 64, 128]] * 2)
    added = {"text_embeds": pooled.repeat(2, 1), "time_ids": sizes}
    theirs = pipeline.unet(noisy, step, states.repeat(2, 1, 1), added_cond_kwargs=added).sample
    ours = backbone.denoise(noisy, step, backbone.encode_prompts([prompt] * 2))
    torch.testing.assert_close(ours, theirs)


@torch.no_grad()
def test_sd2_encodes_prompts_as_diffusers_and_predicts_velocity(tiny_folder_2):
    backbone = load_backbone(str(tiny_folder_2))
    assert backbone.prediction_type == "v_prediction"
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_folder_2)
    states, _ = pipeline.encode_prompt("a red cat", "cpu", 1, False)
    torch.testing.assert_close(backbone.encode_prompts(["a red cat"]).states, states)


def test_both_text_encoders_train_with_one_rate(tiny_folder_xl, photos):
    backbone = load_backbone(str(tiny_folder_xl))
    wanted = {"photos": str(photos), "trigger": "<t>", "class_noun": "toy"}
    config = configure(wanted | {"optim": {"lr": 1e-3, "lr_text_encoder": 2e-4}}, "sd15")
    rates = {group["name"]: group["lr"] for group in PlainLora(backbone, config).groups()}
    assert rates == {"unet": 1e-3, "text_encoder": 2e-4, "text_encoder_2": 2e-4}


def test_a_fingerprint_does_not_depend_on_precision():
    torch.manual_seed(0)
    weights = [torch.randn(320, 4, 3, 3), torch.randn(4, 320, 3, 3)]
    whole = int(fingerprint(weights), 16)

    def distance(other):
        return (whole ^ int(fingerprint(other), 16)).bit_count()

    for dtype in (torch.float16, torch.bfloat16):
        assert distance([weight.to(dtype) for weight in weights]) <= 2
    tuned = [w + 0.05 * torch.randn_like(w) for w in weights]
    assert distance(tuned) <= OTHER_BASE_BITS
    assert distance([torch.randn_like(w) for w in weights]) > 2 * OTHER_BASE_BITS


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_pocket_bases_fingerprint_matches_in_every_precision(pocket, precision):
    one, other = (
        int(each.fingerprint, 16) for each in (pocket, load_backbone("pocket", precision))
    )
    assert (one ^ other).bit_count() <= OTHER_BASE_BITS // 2


CHANGES = {
    "is a PixArtAlphaPipeline": {"_class_name": "PixArtAlphaPipeline"},
    "needs code from os": {"unet": ["os", "system"]},
    "needs code from pipeline": {"_class_name": "StableDiffusionPipeline", "x": ["pipeline", "X"]},
    r"is a \['pipeline', 'Mine'\]": {"_class_name": ["pipeline", "Mine"]},
}


@pytest.mark.parametrize("words", CHANGES)
def test_model_folders_with_foreign_classes_or_code_are_refused(tmp_path, tiny_folder, words):
    shutil.copytree(tiny_folder, tmp_path / "model")
    index = tmp_path / "model/model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | CHANGES[words]))
    with pytest.raises(BackboneError, match=words):
        load_backbone(str(tmp_path / "model"))


@pytest.mark.parametrize("name", ["tiny_folder", "tiny_folder_xl"])
def test_a_cached_hub_model_opens_offline(name, request, tmp_path, monkeypatch):
    """A hub cache laid out as huggingface_hub does, and no network (see conftest)."""
    commit = "0" * 40
    cache = tmp_path / "models--someone--model"
    shutil.copytree(request.getfixturevalue(name), cache / "snapshots" / commit)
    (cache / "refs").mkdir()
    (cache / "refs/main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("diffusers.utils.constants.HF_MODULES_CACHE", str(tmp_path / "modules"))
    backbone = load_backbone("someone/model")
    assert backbone.fingerprint == load_backbone(str(request.getfixturevalue(name))).fingerprint
    with pytest.raises(BackboneError, match="'someone/other' is neither here nor on the hub"):
        load_backbone("someone/other")


def test_a_gated_model_says_how_to_get_it(monkeypatch):
    import httpx
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError

    def refused(*_, **__):
        request = httpx.Request("GET", "https://huggingface.co/some/gated")
        raise GatedRepoError("401", response=httpx.Response(401, request=request))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refused)
    with pytest.raises(
        BackboneError, match=r"accept its licence at https://huggingface\.co/some/g"
    ):
        load_backbone("some/gated")
