"""What encoders say is kept on disk, and they leave memory while nothing needs them."""

import gc
import weakref
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file

from random_adapters import random_adapter
from rite_diffusion.adapters.attach import attach, lora_layers
from rite_diffusion.backbones.fingerprint import fingerprint
from rite_diffusion.backbones.parts import Parts, is_empty
from rite_diffusion.backbones.source import load_backbone, open_backbone
from rite_diffusion.backbones.text_cache import cached_conditioning
from rite_diffusion.errors import RunError
from rite_diffusion.files.writing import cache_folder
from rite_diffusion.training.plan import plan_training
from rite_diffusion.training.run import measure, run_training
from rite_diffusion.training.stages import encode
from runs import config_of
from shared_bases import shared_base

QUIET = {"previews": {"every": 0, "steps": 2}}
FROZEN = {"lora": {"text_encoder": False}}


def planned(photos, **settings):
    return plan_training(config_of(photos, **QUIET | settings))


def encoders(backbone):
    """The encoders as they lie, without calling them back."""
    names = ["vae", *backbone.text_encoders]
    return {name: backbone.parts.as_it_is(name) for name in names}


def in_memory(backbone):
    """The names of the parts that have weights."""
    return {name for name in backbone.parts.names if not is_empty(backbone.parts.as_it_is(name))}


@pytest.fixture
def loads(monkeypatch):
    """Each part that is loaded with those in memory then, and references to their weights."""
    found, load = [], Parts.__getitem__

    def noted(parts, name):
        if is_empty(parts.as_it_is(name)):
            others = {n for n in parts.names if not is_empty(parts.as_it_is(n))}
            part = load(parts, name)
            found.append((name, others, weakref.ref(next(part.parameters()))))
            return part
        return load(parts, name)

    monkeypatch.setattr(Parts, "__getitem__", noted)
    return found


def entries():
    return sorted(path.name for path in (cache_folder() / "captions").rglob("*.safetensors"))


def test_planning_loads_nothing(photos, loads):
    plan = planned(photos, **FROZEN, previews={"every": 1})
    assert plan.inputs()["base"] == plan.backbone.fingerprint
    assert loads == [] and in_memory(plan.backbone) == set()


@pytest.mark.parametrize("folder", ["tiny_folder", "tiny_folder_2", "tiny_folder_xl"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_base_without_weights_has_the_name_of_the_loaded_one(folder, precision, request, loads):
    source = str(request.getfixturevalue(folder))
    opened = open_backbone(source, precision)
    assert loads == []
    loaded = load_backbone(source, precision)
    assert in_memory(loaded) == set(loaded.parts.names)
    weights = [loaded.unet.get_submodule(path).weight for path in ("conv_in", "conv_out")]
    assert opened.fingerprint == loaded.fingerprint == fingerprint(weights)
    for name in ("dtype", "resolution", "latent_channels", "token_budget", "prediction_type"):
        assert getattr(opened, name) == getattr(loaded, name)
    for component in loaded.components:
        assert opened.lora_targets(component, True) == loaded.lora_targets(component, True)
    assert len(loads) == len(loaded.parts.names)  # those of `loaded` alone


def test_each_part_is_in_memory_in_its_own_stage(photos, tmp_path, loads):
    run_training(planned(photos, **FROZEN, validation={"photos": 1}), tmp_path / "run")
    assert [name for name, *_ in loads] == ["vae", "text_encoder", "unet"]
    assert [others for _, others, _ in loads] == [set(), set(), set()]
    gc.collect()
    assert [reference() for _, _, reference in loads[:2]] == [None, None]


def test_previews_load_the_autoencoder_for_the_moment(photos, tmp_path, loads):
    """They are the same as with all parts in memory."""
    settings = FROZEN | {"previews": {"every": 2, "steps": 2}}
    staged = run_training(planned(photos, **settings), tmp_path / "staged")
    assert [name for name, *_ in loads] == ["vae", "text_encoder", "unet", "vae"]
    assert loads[-1][1] == {"unet"}
    plan = planned(photos, **settings, cache=False)
    plan.backbone.load()
    plain = run_training(plan, tmp_path / "plain")
    one, other = ((path.parent / "previews") for path in (staged, plain))
    assert len(list(one.iterdir())) == 2
    for path in one.iterdir():
        assert path.read_bytes() == (other / path.name).read_bytes()


def test_releasing_encoders_gives_the_same_adapter(photos, tmp_path):
    settings = FROZEN | {"validation": {"photos": 1}, "captions": {"dropout": 0.4}}
    kept = planned(photos, **settings)
    with_cache = run_training(kept, tmp_path / "kept")
    assert in_memory(kept.backbone) == {"unet"}
    without = planned(photos, **settings, cache=False)
    without.backbone.load()
    plain = run_training(without, tmp_path / "plain")
    assert in_memory(without.backbone) == {"unet", "text_encoder"}
    one, other = (load_file(path) for path in (with_cache, plain))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({}, {"text_encoder"}),  # the text encoder trains
        (FROZEN, set()),
        (FROZEN | {"captions": {"shuffle": True}}, {"text_encoder"}),  # captions cannot be listed
        (FROZEN | {"previews": {"every": 100}}, set()),
    ],
    ids=["trained", "frozen", "shuffled", "previews"],
)
def test_encoders_that_steps_need_are_not_released(photos, settings, kept):
    plan = planned(photos, **settings)
    plan.backbone.load()
    encode(plan)
    assert in_memory(plan.backbone) == {"unet"} | kept


def test_released_encoders_are_restored_when_needed(photos, pocket):
    plan = planned(photos, **FROZEN)
    measure(plan)
    assert encoders(plan.backbone)["vae"].device.type == "meta"
    latents = torch.randn(1, 8, 16, 16)
    assert torch.equal(plan.backbone.decode(latents), pocket.decode(latents))
    prompts = ["a cat", "a <thing>"]
    ours, fresh = (each.encode_prompts(prompts).states for each in (plan.backbone, pocket))
    assert torch.equal(ours, fresh)
    assert not any(p.requires_grad for p in plan.backbone.text_encoder.parameters())


def test_after_a_run_adapters_attach_to_the_text_encoder_again(photos, pocket):
    plan = planned(photos, **FROZEN)
    measure(plan)
    assert encoders(plan.backbone)["text_encoder"].device.type == "meta"
    for backbone in (plan.backbone, pocket):
        attach(backbone, random_adapter(pocket), "other")
    ours, fresh = (each.encode_prompts(["a cat"]).states for each in (plan.backbone, pocket))
    assert torch.equal(ours, fresh) and lora_layers(pocket, "other")


def test_released_encoders_move_to_main_memory_on_other_devices(own_pocket):
    own_pocket.device = own_pocket.parts.device = torch.device(
        "meta"
    )  # stands in for an accelerator
    own_pocket.release(["vae"])
    assert encoders(own_pocket)["vae"].device.type == "cpu"
    assert own_pocket.vae.device.type == "meta"


def test_requested_previews_restore_the_encoders(photos, tmp_path):
    plan, run = planned(photos, **FROZEN), tmp_path / "run"
    (run / "requests").mkdir(parents=True)
    (run / "requests/sample").touch()
    run_training(plan, run)
    assert len(list((run / "previews").iterdir())) == 2
    assert encoders(plan.backbone)["vae"].device.type == "meta"


def test_a_deleted_base_skips_previews_without_stopping_the_run(photos, tmp_path, tiny_folder):
    base = tmp_path / "base"
    base.symlink_to(tiny_folder)
    plan = planned(photos, **FROZEN, base=str(base), resolution=64, precision="fp32")
    run = tmp_path / "run"
    (run / "requests").mkdir(parents=True)
    (run / "requests/sample").touch()
    plan.backbone.load()
    base.unlink()
    assert run_training(plan, run).exists()
    assert "no previews of step 1" in (run / "log.txt").read_text()


def test_only_an_edited_caption_is_encoded_again(photos):
    encode(planned(photos, **FROZEN))
    before = entries()
    assert len(before) == 3
    (photos / "0.txt").write_text("a <thing> on a purple background")
    plan = planned(photos, **FROZEN)
    wrapped = plan.backbone.encode_captions
    with patch.object(plan.backbone, "encode_captions", wraps=wrapped) as encoded:
        encode(plan)
    encoded.assert_called_once_with(["a <thing> on a purple background"])
    assert len(set(entries()) - set(before)) == 1


@pytest.mark.parametrize("damage", [b"", b"no tensors", None], ids=["empty", "text", "nan"])
def test_a_damaged_caption_cache_entry_is_replaced(pocket, tmp_path, damage):
    whole = cached_conditioning(pocket, "a cat", tmp_path).states
    [path] = tmp_path.rglob("*.safetensors")
    content = path.read_bytes()
    path.write_bytes(content[:-4] + b"\xff\xff\xff\x7f" if damage is None else damage)
    assert torch.equal(cached_conditioning(pocket, "a cat", tmp_path).states, whole)
    assert path.read_bytes() == content


def test_sdxl_keeps_its_pooled_embedding(tiny_folder_xl, tmp_path):
    backbone = load_backbone(str(tiny_folder_xl))
    for prompt in ("a cat", ""):
        made, read = (cached_conditioning(backbone, prompt, tmp_path) for _ in range(2))
        expected = backbone.encode_prompts([prompt])
        assert torch.equal(read.states, expected.states) and torch.equal(made.states, read.states)
        assert torch.equal(read.extra["pooled"], expected.extra["pooled"])
    backbone.release(["text_encoder_2"])
    assert encoders(backbone)["text_encoder_2"].device.type == "meta"
    assert torch.equal(backbone.encode_prompts(["a cat"]).states, _states(tiny_folder_xl))


def _states(folder):
    return shared_base(str(folder)).encode_prompts(["a cat"]).states


def test_caption_cache_entries_depend_on_encoder_and_precision(
    tmp_path, tiny_folder, tiny_folder_2
):
    names = {shared_base(str(each)).text_fingerprint for each in (tiny_folder, tiny_folder_2)}
    names |= {load_backbone(str(tiny_folder), "bf16").text_fingerprint}
    changed = load_backbone(str(tiny_folder))
    with torch.no_grad():
        changed.text_encoder.get_input_embeddings().weight[5, 5] += 1
    assert len(names | {changed.text_fingerprint}) == 4
    assert load_backbone(str(tiny_folder)).text_fingerprint in names


def test_a_cache_that_cannot_be_written_is_named(photos, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("RITE_CACHE", str(tmp_path / "file"))
    with pytest.raises(RunError, match=r"cannot write to the cache .*file.*RITE_CACHE"):
        run_training(planned(photos), tmp_path / "run")
    with pytest.raises(RunError, match=r"cannot write to the cache .*file.*RITE_CACHE"):
        planned(photos, prior={"weight": 1.0, "count": 1})
