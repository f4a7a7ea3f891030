import pickle
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from models import (
    tiny_stable_diffusion,
    tiny_stable_diffusion_2,
    tiny_stable_diffusion_xl,
    true_stable_diffusion_15,
)
from reference.ldm_layout import ldm_state_dict
from rite_diffusion.backbones.checkpoint import CLIP, UNET, VAE, Checkpoint
from rite_diffusion.backbones.clip_tokenizer import clip_tokenizer
from rite_diffusion.backbones.single_file import (
    load_single_file,
    noise_schedule,
    unet_config,
    vae_config,
)
from rite_diffusion.backbones.text_checkpoint import clip_config
from rite_diffusion.errors import BackboneError

TOKENS = f"{CLIP}text_model.embeddings.token_embedding.weight"
POSITIONS = f"{CLIP}text_model.embeddings.position_embedding.weight"
TO_STATES = f"{UNET}middle_block.1.transformer_blocks.0.attn2.to_k.weight"
LAST_NORM = f"{UNET}output_blocks.0.0.out_layers.0.bias"


@pytest.fixture(scope="module")
def tiny():
    return tiny_stable_diffusion()


@pytest.fixture(scope="module")
def tensors(tiny):
    return ldm_state_dict(tiny)


@pytest.fixture
def offline(monkeypatch):
    def refuse(*_):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def written(folder: Path, tensors: dict, metadata: dict | None = None) -> Path:
    path = folder / "model.safetensors"
    save_file(tensors, path, metadata)
    return path


def parts(pipeline) -> tuple:
    return pipeline.unet, pipeline.vae, pipeline.text_encoder


def assert_same_weights(found, original):
    for mine, theirs in zip(parts(found), parts(original), strict=True):
        weights, expected = mine.state_dict(), theirs.state_dict()
        assert weights.keys() == expected.keys()
        for name, weight in weights.items():
            assert weight.dtype == expected[name].dtype
            assert torch.equal(weight, expected[name]), name


@torch.no_grad()
def outputs(pipeline, latent_side: int):
    """What each part makes of the same input: text states, a prediction, a picture, its latents."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 4, latent_side, latent_side, generator=generator)
    ids = pipeline.tokenizer(["a photo of a cat"], padding="max_length", return_tensors="pt")
    states = pipeline.text_encoder(ids.input_ids).last_hidden_state
    prediction = pipeline.unet(latents, 7, encoder_hidden_states=states).sample
    picture = pipeline.vae.decode(latents).sample
    return states, prediction, picture, pipeline.vae.encode(picture).latent_dist.mean


def assert_same_outputs(found, original, latent_side: int):
    pairs = zip(outputs(found, latent_side), outputs(original, latent_side), strict=True)
    for mine, theirs in pairs:
        assert mine.isfinite().all() and mine.std() > 0
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("layers_per_block", [1, 2])
def test_a_single_file_gives_the_original_weights_and_outputs(layers_per_block, tmp_path, offline):
    original = tiny_stable_diffusion(layers_per_block)
    found = load_single_file(written(tmp_path, ldm_state_dict(original)))
    assert_same_weights(found, original)
    assert_same_outputs(found, original, latent_side=8)


@torch.no_grad()
@pytest.mark.parametrize("build", [tiny_stable_diffusion_2, tiny_stable_diffusion_xl])
def test_sd2_and_sdxl_open_as_the_originals(build, tmp_path, offline):
    original = build()
    tensors = ldm_state_dict(original)
    found = load_single_file(written(tmp_path, {k: v.contiguous() for k, v in tensors.items()}))
    assert type(found) is type(original)
    named = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    for name in (name for name in named if name in original.components):
        mine, theirs = getattr(found, name), getattr(original, name)
        if "tokenizer" in name:
            assert mine("a cat", padding="max_length") == theirs("a cat", padding="max_length")
            continue
        weights = mine.state_dict()
        assert weights.keys() == theirs.state_dict().keys()
        assert all(torch.equal(weights[k], v) for k, v in theirs.state_dict().items())
        if "text" in name:
            ids = torch.tensor([[49406, 320, 2368, 49407] + [0] * 73])
            torch.testing.assert_close(mine(ids)[0], theirs(ids)[0])
    states = torch.randn(1, 5, original.unet.config.cross_attention_dim)
    extra = {"text_embeds": torch.randn(1, 64), "time_ids": torch.ones(1, 6)}
    given = torch.randn(1, 4, 8, 8), 7, states
    mine, theirs = (p.unet(*given, added_cond_kwargs=extra).sample for p in (found, original))
    assert torch.equal(mine, theirs)
    assert found.vae.config.scaling_factor == original.vae.config.scaling_factor
    kind = original.scheduler.config.prediction_type
    assert found.scheduler.config.prediction_type == kind


def test_a_single_file_pipeline_draws_the_original_picture(tiny, tensors, tmp_path, offline):
    found = load_single_file(written(tmp_path, tensors))
    pictures = [
        pipeline(
            "a photo of a cat",
            height=64,
            width=64,
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(0),
            output_type="np",
        ).images
        for pipeline in (found, tiny)
    ]
    assert (pictures[0] == pictures[1]).all()
    assert found.safety_checker is None


@pytest.mark.parametrize(
    ("stored", "asked"), [(torch.float16, torch.float32), (torch.float32, torch.bfloat16)]
)
def test_single_files_open_in_the_requested_precision(stored, asked, tiny, tensors, tmp_path):
    path = written(tmp_path, {name: tensor.to(stored) for name, tensor in tensors.items()})
    found = load_single_file(path, dtype=asked)
    for mine, theirs in zip(parts(found), parts(tiny), strict=True):
        expected = theirs.state_dict()
        for name, weight in mine.state_dict().items():
            assert weight.dtype == asked
            assert torch.equal(weight, expected[name].to(stored).to(asked)), name


def test_weights_stay_valid_after_their_file_is_deleted(tiny, tensors, tmp_path):
    path = written(tmp_path, tensors)
    found = load_single_file(path)
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert_same_weights(found, tiny)


def test_training_state_in_a_checkpoint_is_ignored(tiny, tensors, tmp_path):
    left = (
        "alphas_cumprod",
        "betas",
        "sqrt_recipm1_alphas_cumprod",
        "posterior_mean_coef1",
        "model_ema.decay",
        "model_ema.diffusion_modelinput_blocks00weight",
        "first_stage_model.loss.logvar",
        "cond_stage_model.logit_scale",
        f"{CLIP}text_projection.weight",
    )
    found = load_single_file(written(tmp_path, tensors | {name: torch.ones(2) for name in left}))
    assert_same_weights(found, tiny)


def test_text_encoders_without_the_text_model_level_open(tiny, tensors, tmp_path):
    flat = {name.replace(f"{CLIP}text_model.", CLIP): tensor for name, tensor in tensors.items()}
    assert_same_weights(load_single_file(written(tmp_path, flat)), tiny)


def header(tensors: dict, metadata: dict | None = None) -> Checkpoint:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return Checkpoint(Path("model.safetensors"), shapes, metadata or {})


def test_the_noise_schedule_is_that_of_sd1(tiny, tensors):
    scheduler = noise_schedule(header(tensors))
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    assert torch.equal(scheduler.alphas_cumprod, (1 - betas).cumprod(0))
    assert scheduler.config.prediction_type == "epsilon"
    options = ("clip_sample", "set_alpha_to_one", "steps_offset", "timestep_spacing")
    assert [scheduler.config[name] for name in options] == [False, False, 1, "leading"]


def test_checkpoint_markers_set_objective_schedule_and_size(tensors):
    for marked in (
        header({"v_pred": torch.zeros(0)}),
        header({}, {"modelspec.prediction_type": "v"}),
    ):
        assert noise_schedule(marked).config.prediction_type == "v_prediction"
    assert noise_schedule(header({"ztsnr": torch.zeros(0)})).alphas_cumprod[-1] < 1e-6
    assert unet_config(header(tensors))["sample_size"] == 64
    assert unet_config(header(tensors, {"modelspec.resolution": "768x768"}))["sample_size"] == 96


def test_true_sizes_are_read_off_the_shapes_of_sd15():
    with torch.device("meta"):
        tensors = ldm_state_dict(true_stable_diffusion_15())
    checkpoint = header(tensors)
    # The published v1-5-pruned-emaonly.safetensors holds so many tensors of each part.
    counts = [sum(name.startswith(part) for name in tensors) for part in (UNET, VAE, CLIP)]
    assert counts == [686, 248, 197]
    assert checkpoint.shape(f"{UNET}output_blocks.2.1.conv.weight") == (1280, 1280, 3, 3)
    assert checkpoint.shape(f"{UNET}output_blocks.8.2.conv.weight") == (640, 640, 3, 3)
    unet, vae, clip = unet_config(checkpoint), vae_config(checkpoint), clip_config(checkpoint)
    assert unet["block_out_channels"] == (320, 640, 1280, 1280)
    assert unet["down_block_types"] == (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D")
    assert unet["up_block_types"] == ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3)
    assert (unet["layers_per_block"], unet["cross_attention_dim"]) == (2, 768)
    assert (unet["in_channels"], unet["out_channels"], unet["sample_size"]) == (4, 4, 64)
    assert vae["block_out_channels"] == (128, 256, 512, 512)
    assert (vae["layers_per_block"], vae["latent_channels"]) == (2, 4)
    assert clip == {
        "vocab_size": 49408,
        "max_position_embeddings": 77,
        "hidden_size": 768,
        "projection_dim": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
    }


WRONG_TENSORS = {
    "SDXL": ({"conditioner.embedders.0.x": (1,)}, "no CLIP text encoder .* whole .* Diffusion XL"),
    "SDXL's refiner": ({"conditioner.embedders.0.model.x": (1,)}, "SDXL's refiner"),
    "SD2": ({"cond_stage_model.model.ln_final.bias": (1,)}, "unexpected .cond_stage_model.transf"),
    "LoRA": ({"lora_unet_mid_block.lora_up.weight": (1,)}, "LoRA adapter"),
    "inpainting": ({f"{UNET}input_blocks.0.0.weight": (32, 9, 3, 3)}, "inpainting model"),
    "channels": ({f"{UNET}input_blocks.0.0.weight": (32, 8, 3, 3)}, "8 channels, its latents .* 4"),
    "foreign text": ({TO_STATES: (64, 96)}, "text of width 96, its CLIP gives 64"),
    "vocabulary": ({TOKENS: (49407, 64)}, "knows 49407 tokens, CLIP's tokenizer 49408"),
    "prompt length": ({POSITIONS: (32, 64)}, "reads 32 tokens, CLIP's tokenizer gives 77"),
    "heads": ({TOKENS: (49408, 200), TO_STATES: (64, 200)}, "width 200 is not a multiple of 64"),
    "odd width": (
        {f"{VAE}encoder.down.0.block.0.conv1.weight": (48, 32, 3, 3)},
        "not all multiples of 32",
    ),
    "no matrix": ({TO_STATES: (64,)}, "lacks the weight '.*attn2.to_k.weight'"),
    "shape": ({LAST_NORM: (96,)}, "1 of another shape .up_blocks.0.resnets.0.norm2.bias"),
    "extra in UNet": ({f"{UNET}label_emb.0.0.weight": (8, 8)}, "1 unexpected .*label_emb.0.0"),
    "extra in VAE": ({f"{VAE}encoder.down.1.attn.0.q.weight": (8, 8)}, "1 unexpected .*attn.0.q"),
    "extra beside": ({f"embedding.{i}": (1,) for i in range(5)}, "5 unexpected .*embedding.2, …"),
}


@pytest.mark.parametrize("case", WRONG_TENSORS)
def test_other_models_are_refused_by_name(case, tensors, tmp_path):
    shapes, message = WRONG_TENSORS[case]
    path = written(tmp_path, tensors | {name: torch.zeros(size) for name, size in shapes.items()})
    with pytest.raises(BackboneError, match=message) as error:
        load_single_file(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("absent", "message"),
    [
        (UNET, "no UNet"),
        (VAE, "no autoencoder"),
        (CLIP, "no CLIP text encoder"),
        (LAST_NORM, "1 missing .up_blocks.0.resnets.0.norm2.bias"),
        (f"{UNET}output_blocks.0.0.in_layers", "4 missing .up_blocks.0.resnets.0.conv1.bias, .* …"),
        (f"{VAE}decoder.conv_in", "lacks the weight 'first_stage_model.decoder.conv_in.weight'"),
        (f"{UNET}output_blocks.3.2.conv.bias", "lacks the tensor 'output_blocks.3.2.conv.bias'"),
        (f"{VAE}encoder.down.0.downsample.conv.bias", "1 missing .*downsamplers.0.conv.bias"),
        (f"{CLIP}text_model.encoder.layers.0.layer_norm1", "2 missing .*layer_norm1.bias"),
    ],
)
def test_incomplete_checkpoints_are_refused(absent, message, tensors, tmp_path):
    rest = {name: tensor for name, tensor in tensors.items() if not name.startswith(absent)}
    with pytest.raises(BackboneError, match=message):
        load_single_file(written(tmp_path, rest))


class Canary:
    """A pickle of this writes a file when it is opened."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["model.ckpt", "model.pt", "model.bin", "model.safetensors"])
def test_pickles_are_refused_unopened(name, tmp_path):
    path, canary = tmp_path / name, tmp_path / "canary"
    path.write_bytes(pickle.dumps(Canary(canary)))
    with pytest.raises(BackboneError, match="is a pickle"):
        load_single_file(path)
    assert not canary.exists()
    pickle.loads(path.read_bytes())
    assert canary.exists()  # the canary does sing


def test_a_torch_zip_under_another_name_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    torch.save({"weight": torch.ones(1)}, path)
    with pytest.raises(BackboneError, match="a pickle or a zip under another name"):
        load_single_file(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "its 0 bytes are damaged or cut short"),
        (b"\n<!DOCTYPE html><html>Sign in</html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n", "git lfs pull"),
        (b"\xff" * 4096, "its 4,096 bytes are damaged or cut short"),
    ],
)
def test_files_that_are_not_safetensors_are_refused_by_name(content, message, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(BackboneError, match=message):
        load_single_file(path)


def test_a_download_cut_short_is_refused(tensors, tmp_path):
    path = written(tmp_path, tensors)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BackboneError, match="damaged or cut short .* Download it again"):
        load_single_file(path)


def test_a_folder_or_an_absent_file_is_refused(tmp_path):
    with pytest.raises(BackboneError, match="there is no file"):
        load_single_file(tmp_path / "absent.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(BackboneError, match="there is no file"):
        load_single_file(tmp_path / "folder.safetensors")


def test_the_tokenizer_gives_the_ids_of_openai_clip(offline):
    tokenizer = clip_tokenizer()
    assert len(tokenizer) == 49408
    assert tokenizer.model_max_length == 77
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert tokenizer("sks").input_ids == [49406, 48136, 49407]
    assert tokenizer("").input_ids == [49406, 49407]
    assert tokenizer.decode(tokenizer("Café, 東京 🐶!").input_ids[1:-1]) == "café , 東京 🐶!"
    padded = tokenizer("a cat", padding="max_length").input_ids
    assert padded == [49406, 320, 2368] + [49407] * 74


@pytest.mark.full_size
@pytest.mark.timeout(3600)
def test_a_checkpoint_of_true_size_opens_as_the_original(tmp_path, offline):
    original = true_stable_diffusion_15()
    for part in parts(original):
        part.half()
    path = written(tmp_path, ldm_state_dict(original))  # 2.1 GB
    found = load_single_file(path)
    path.unlink()  # pytest would keep it
    for part in parts(original):
        part.float()
    assert_same_weights(found, original)
    assert_same_outputs(found, original, latent_side=8)
