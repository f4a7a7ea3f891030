"""The whole way on flow transformers: settings, training, resuming, drawing, fusing, refusals."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import rite_diffusion as rite
from flow_bases import adapter_on, family, latents_of
from flow_models import PIPELINES, flux, with_random_weights
from rite_diffusion.adapters import AdapterInfo, save_adapter
from rite_diffusion.adapters.attach import attach
from rite_diffusion.adapters.names import dotted
from rite_diffusion.backbones.families import family_name
from rite_diffusion.backbones.source import load_backbone
from rite_diffusion.config import from_toml
from rite_diffusion.errors import BackboneError, ConfigError
from rite_diffusion.fusion.statistics import Drawing
from rite_diffusion.generation.denoise import sample
from rite_diffusion.methods.lora import Lora
from rite_diffusion.optim import LoraRite
from rite_diffusion.photos.dataset import LatentSet
from rite_diffusion.training.batch import draw_batch
from rite_diffusion.training.loss import diffusion_loss
from runs import whole_and_resumed

QUICK = {
    "steps": 4, "resolution": 64, "precision": "fp32", "prior": {"weight": 0},
    "previews": {"every": 0}, "lora": {"text_encoder": False, "rank": 2},
    "optim": {"name": "rite", "lr": 1e-2},
}  # fmt: skip
QUICK_ONES = ("z-image", "flux", "sd3")  # the other families train in the slow tests
EVERY_FAMILY = [
    pytest.param(name, marks=[] if name in QUICK_ONES else pytest.mark.slow) for name in PIPELINES
]
ABOUT = {"trigger": "<thing>", "class_noun": "toy"}


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """A diffusers folder of each family, written when it is asked for."""
    root, written = tmp_path_factory.mktemp("flows"), {}

    def folder(name):
        if name not in written:
            torch.manual_seed(0)
            pipeline = with_random_weights(PIPELINES[name]())
            pipeline.save_pretrained(root / name)
            written[name] = str(root / name)
        return written[name]

    return folder


@pytest.mark.parametrize("name", EVERY_FAMILY)
def test_a_folder_of_every_family_trains_and_draws(name, folders, photos, tmp_path):
    base = folders(name)
    assert family_name(base) == name
    adapter = rite.train(
        photos, base=base, out=tmp_path / "run", **ABOUT,
        **QUICK | {"previews": {"every": 4, "steps": 2}, "batch": 2, "validation": {"photos": 1}},
    )  # fmt: skip
    settings = from_toml((tmp_path / "run/config.toml").read_text())
    assert settings.objective.timesteps == "logit_normal" and settings.gradient_checkpointing
    assert len(list((tmp_path / "run/previews").iterdir())) == 2
    found = rite.inspect(adapter)
    assert found.info.family == name and found.info.trigger == "<thing>"
    assert any(pair.up.any() for pair in found.pairs)
    plain, learned = (
        rite.generate("a <thing>", base=base, adapters=own, steps=2, width=64, height=64)[0]
        for own in ([], [adapter])
    )
    assert plain.size == (64, 64) and plain.tobytes() != learned.tobytes()


@pytest.mark.parametrize("name", ["z-image", "flux2"])
def test_a_stopped_run_goes_on_bit_for_bit(name, folders, photos, tmp_path):
    settings = QUICK | {"base": folders(name), "batch": 2, "captions": {"dropout": 0.3}}
    one, other = whole_and_resumed(photos, tmp_path, **ABOUT, **settings)
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("name", EVERY_FAMILY)
def test_four_latents_can_be_overfitted(name, monkeypatch):
    """The tiny last layers, which are frozen, span a third to a half of the latents' channels."""
    base = family(name)
    monkeypatch.setattr(base, "tokens", 32)
    latents = latents_of(base, count=4, seed=3) * 0.5
    captions = ["a cat", "a dog", "a bus", "an owl"]
    data = LatentSet(list(latents), None, [0, 1, 2, 3], captions, [1.0] * 4, list("abcd"))
    lora = Lora(base, rank=16, layers="blocks", text_encoder=False)
    optimizer = LoraRite(lora.parameter_groups(), lr=0.1)
    batch, losses = draw_batch(base, data, 0, size=4), []
    try:
        for _ in range(40):
            loss = diffusion_loss(base, batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    finally:
        lora.remove()
    assert losses[-1] < 0.7 * losses[0]


def test_an_adapter_attached_and_taken_out_leaves_the_base(folders, photos, tmp_path):
    adapter = rite.train(photos, base=folders("z-image"), out=tmp_path / "run", **ABOUT, **QUICK)
    backbone = load_backbone(folders("z-image"))
    before = sample(backbone, ["a cat"], [0], steps=2, width=64, height=64)[0].tobytes()
    attach(backbone, rite.inspect(adapter), "one")
    from rite_diffusion.adapters.attach import detach

    assert sample(backbone, ["a cat"], [0], steps=2, width=64, height=64)[0].tobytes() != before
    detach(backbone, "one")
    assert sample(backbone, ["a cat"], [0], steps=2, width=64, height=64)[0].tobytes() == before


@pytest.mark.parametrize("method", ["pivotal", "custom_diffusion", "ed_lora"])
def test_methods_that_cannot_be_are_refused_with_the_reason(method, folders, photos):
    with pytest.raises(ConfigError, match=rf"method {method} does not train .*\(z-image\): .*lora"):
        rite.train(photos, base=folders("z-image"), method=method, **ABOUT, **QUICK)


def test_text_encoders_are_not_adapted(folders, photos):
    settings = QUICK | {"lora": {"text_encoder": True, "rank": 2}}
    with pytest.raises(ConfigError, match=r"lora\.text_encoder = true: the text encoder of"):
        rite.train(photos, base=folders("z-image"), **ABOUT, **settings)


def test_half_precision_is_refused_before_weights_are_read(folders, photos, tmp_path):
    with pytest.raises(BackboneError, match="overflows in fp16"):
        load_backbone(folders("z-image"), "fp16")


def test_a_distilled_base_is_refused_unless_it_is_wanted(photos, tmp_path):
    torch.manual_seed(0)
    with_random_weights(flux(guidance=False)).save_pretrained(tmp_path / "schnell")
    settings = QUICK | {"base": str(tmp_path / "schnell")}
    with pytest.raises(ConfigError, match=r"distilled to few steps.*train on FLUX\.1-dev"):
        rite.train(photos, out=tmp_path / "run", **ABOUT, **settings)
    wanted = settings | {"lora": {"text_encoder": False, "rank": 2, "distilled": True}}
    assert rite.train(photos, out=tmp_path / "run", **ABOUT, **wanted).exists()


def test_an_assistant_acts_in_training_and_not_in_previews(photos, tmp_path):
    """Its update is part of the base that is trained on, and of nothing else."""
    torch.manual_seed(0)
    with_random_weights(PIPELINES["z-image"]()).save_pretrained(tmp_path / "turbo")
    base = str(tmp_path / "turbo")
    backbone = load_backbone(base)
    assert backbone.guidance.kind == "none" and "train on Z-Image" in backbone.support.distilled
    save_adapter(tmp_path / "assistant.safetensors", adapter_on(backbone))
    common = QUICK | ABOUT | {"base": base, "previews": {"every": 4, "steps": 1}}

    def trained(name, **lora):
        return rite.train(photos, out=tmp_path / name, **common | {"lora": common["lora"] | lora})

    with pytest.raises(ConfigError, match=r"training adapter \(lora\.assistant\)"):
        trained("refused")
    foreign = replace(adapter_on(backbone), info=AdapterInfo(base="x", base_fingerprint="0" * 16))
    save_adapter(tmp_path / "foreign.safetensors", foreign)
    with pytest.raises(rite.RiteError, match=r"lora\.assistant was trained on 'x'.*as the base\.$"):
        trained("refused", assistant=str(tmp_path / "foreign.safetensors"))
    plain = trained("plain", distilled=True, rank=2)
    helped = trained("helped", assistant=str(tmp_path / "assistant.safetensors"))
    one, other = load_file(plain), load_file(helped)
    assert one.keys() == other.keys()  # nothing of the assistant is in the result
    assert any(not torch.equal(one[key], other[key]) for key in one if "lora_B" in key)
    merged = load_backbone(base)  # the same training on the base with the assistant merged into it
    with torch.no_grad():
        for pair in adapter_on(backbone).pairs:
            path = dotted(pair.name.removeprefix("lora_transformer_"))
            weight = merged.transformer.get_submodule(path).weight
            weight += pair.scale * pair.up @ pair.down
    merged.pipeline.save_pretrained(tmp_path / "merged-turbo")
    on_merged = common | {"base": str(tmp_path / "merged-turbo")}
    on_merged["lora"] = common["lora"] | {"distilled": True}
    wanted = load_file(rite.train(photos, out=tmp_path / "merged", **on_merged))
    assert all(torch.allclose(other[key], wanted[key], rtol=1e-3, atol=1e-4) for key in other)
    metadata = rite.inspect(helped).info.config
    assert 'assistant = "assistant.safetensors"' in metadata and str(tmp_path) not in metadata
    drawn = sample(backbone, ["a photo of <thing> on the beach"], [0], steps=1, width=64, height=64)
    assert drawn[0].size == (64, 64)


def test_an_adapter_of_another_family_is_refused(folders, photos, tmp_path):
    adapter = rite.train(photos, base=folders("z-image"), out=tmp_path / "run", **ABOUT, **QUICK)
    with pytest.raises(rite.RiteError, match="adapter was trained on 'z-image'"):
        rite.generate("a <thing>", base=folders("sd3"), adapters=[adapter], steps=1)


def test_a_negative_prompt_without_effect_is_refused(folders):
    with pytest.raises(ConfigError, match="has no negative prompt"):
        rite.generate("a cat", negative="a dog", base=folders("flux"), steps=1, width=64, height=64)


def test_condition_pictures_are_refused(folders, tmp_path):
    from PIL import Image

    Image.new("RGB", (64, 64)).save(tmp_path / "pose.png")
    with pytest.raises(ConfigError, match="condition pictures are for Stable Diffusion"):
        rite.generate("a cat", base=folders("z-image"), steps=1,
                      controls=[f"some/net={tmp_path / 'pose.png'}"])  # fmt: skip


def test_regions_mix_predictions(folders):
    """A picture of two regions with one prompt is that prompt's; with two it is neither's."""
    base, options = folders("z-image"), {"steps": 2, "width": 64, "height": 64, "seed": 1}
    halves = ["0,0,0.5,1: {}", "0.5,0,1,1: {}"]

    def drawn(one, other):
        regions = [half.format(text) for half, text in zip(halves, (one, other), strict=True)]
        return rite.generate("a cat", base=base, regions=regions, **options)[0].tobytes()

    plain = rite.generate("a cat", base=base, **options)[0].tobytes()
    assert drawn("a cat", "a cat") == plain
    assert drawn("a cat", "a dog on a red background") not in (plain, drawn("a dog", "a dog"))


def test_the_index_alone_tells_a_flow(folders, tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "Krea2Pipeline"}))
    assert family_name(str(tmp_path)) == "krea2"
    assert family_name(str(tmp_path / "none")) is None


@pytest.mark.parametrize("target", ["diffusers", "comfyui", "kohya", "peft"])
@pytest.mark.parametrize("name", PIPELINES)
def test_an_adapter_converts_to_every_dialect_and_is_verified(name, target, tmp_path):
    base = family(name)
    save_adapter(tmp_path / "a.safetensors", adapter_on(base))
    export = rite.convert(tmp_path / "a.safetensors", target, tmp_path / f"b-{target}.safetensors"
                          if target != "peft" else tmp_path / "b")  # fmt: skip
    [check] = export.checks
    assert check.modules == len(base.lora_targets("transformer", blocks=True))
    assert check.difference < 1e-5


def test_two_adapters_are_fused(folders, photos, tmp_path):
    """With the layers' second moments; the fused file keeps each one's update where it acts."""
    base = folders("sd3")
    adapters = [
        rite.train(
            photos, base=base, out=tmp_path / word, trigger=f"<{word}>", class_noun="toy", **QUICK
        )
        for word in ("one", "two")
    ]
    fused = rite.fuse(
        adapters, base=base, out=tmp_path / "f.safetensors", drawing=Drawing(steps=2),
        allow_loss=True,
    )  # fmt: skip
    found = rite.inspect(fused)
    assert found.info.trigger == "<one>, <two>" and found.info.family == "sd3"
    assert len(found.pairs) == len(rite.inspect(adapters[0]).pairs)
    rite.generate("<one> and <two>", base=base, adapters=[fused], steps=1, width=64, height=64)


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("double_blocks.0.img_attn.qkv.weight", "a Flux file"),
        ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", "an SD3 file"),
        ("layers.0.attention.qkv.weight", "a Z-Image or Lumina file"),
        ("blocks.0.attn.wq.weight", "a Krea 2 file"),
        ("transformer_blocks.0.img_mod.1.weight", "a Qwen-Image file"),
    ],
)
def test_a_denoiser_alone_says_what_is_missing(key, words, tmp_path):
    save_file({key: torch.zeros(2, 2)}, tmp_path / "flow.safetensors")
    with pytest.raises(BackboneError, match=f"this is {words}.*FILE.safetensors@MODEL"):
        load_backbone(str(tmp_path / "flow.safetensors"))
