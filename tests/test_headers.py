"""What a conversion keeps of a file besides its update: header entries and precision."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import rite_diffusion as rite
from random_adapters import BLOCK, mixed_adapter, pair
from rite_diffusion.adapters import load_adapter, save_adapter
from rite_diffusion.adapters.delta import delta_weight, relative_difference
from rite_diffusion.adapters.dialects.peft import MODEL
from rite_diffusion.adapters.file import read_header
from rite_diffusion.errors import AdapterError

FOREIGN = {
    "ss_tag_frequency": json.dumps({"10_dog": {"dog": 12, "grass": 3}}),
    "ss_training_comment": "trained on a rainy day",
    "modelspec.author": "Ann",
    "modelspec.license": "cc-by-4.0",
    "modelspec.title": "A dog",
    "modelspec.description": "Zeilen\nund ü",
    "ss_network_module": "networks.lora",
    "ss_sd_model_name": "somebody/base",
    "ss_learning_rate": "0.0001",
    "anything.else": "kept",
}
# They would be wrong of another file's tensors.
OF_TENSORS = {
    "modelspec.hash_sha256": "0x12",
    "sshs_model_hash": "34",
    "sshs_legacy_hash": "56",
    "lora_adapter_metadata": json.dumps({"unet.r": 4, "unet.lora_alpha": 4}),
}


def header_of(path) -> dict[str, str]:
    folder = path / "unet" / MODEL if path.is_dir() else path
    return read_header(folder)


def foreign_file(folder, dtype=torch.float32):
    """A file as kohya's scripts leave it."""
    path = folder / "a.safetensors"
    save_adapter(path, mixed_adapter())
    tensors = {key: value.to(dtype) for key, value in load_file(path).items()}
    save_file(tensors, path, FOREIGN | OF_TENSORS)
    return path


@pytest.mark.parametrize("second", ["kohya", "comfyui", "diffusers", "peft"])
@pytest.mark.parametrize("first", ["kohya", "comfyui", "diffusers", "peft"])
def test_other_tools_header_entries_stay(tmp_path, first, second):
    once = rite.convert(foreign_file(tmp_path), first).path
    suffix = "" if second == "peft" else ".safetensors"
    twice = rite.convert(once, second, tmp_path / f"b{suffix}").path
    for path in (once, twice):
        header = header_of(path)
        assert {key: header.get(key) for key in FOREIGN} == FOREIGN
        kept = OF_TENSORS.keys() & header.keys()
        assert kept <= {"lora_adapter_metadata"}  # diffusers' own, of this file's tensors
        assert "lora_adapter_metadata" not in kept or header["lora_adapter_metadata"] not in (
            OF_TENSORS.values()
        )
    assert load_adapter(twice).info.licence == "cc-by-4.0"
    assert load_adapter(twice).info.base == "somebody/base"


def test_our_own_facts_are_not_foreign(tmp_path):
    adapter = mixed_adapter()
    save_adapter(tmp_path / "a.safetensors", adapter)
    read = load_adapter(tmp_path / "a.safetensors")
    assert read.info.trigger == "<t>" and not any(key.startswith("rite_") for key in read.foreign)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("to", ["kohya", "comfyui", "diffusers", "peft"])
def test_a_conversion_keeps_the_precision_and_says_so(tmp_path, command, to, dtype):
    path = foreign_file(tmp_path, dtype)
    name = {torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
    done = command("convert", path, "--to", to)
    assert done.returncode == 0, done.stderr
    out = tmp_path / ("a-peft" if to == "peft" else f"a-{to}.safetensors")
    assert f"wrote       {out} in {name}\n" in done.stdout
    for file in out.rglob("*.safetensors") if to == "peft" else [out]:
        for key, value in load_file(file).items():
            assert value.dtype == (dtype if value.ndim else torch.float32), key
    for one, other in zip(load_adapter(out).pairs, load_adapter(path).pairs, strict=True):
        error = relative_difference(delta_weight(one), delta_weight(other))
        assert error <= 4 * torch.finfo(dtype).eps


def test_convert_writes_the_requested_precision(tmp_path, command):
    path = foreign_file(tmp_path)
    done = command("convert", path, "--to", "kohya", "--dtype", "fp16")
    assert "in fp16; fp32 in the file that was read" in done.stdout, done.stderr
    assert load_adapter(tmp_path / "a-kohya.safetensors").dtype == torch.float16
    wrong = command("convert", path, "--to", "peft", "--dtype", "fp8")
    assert wrong.returncode == 2 and "choose one of fp32, fp16, bf16" in wrong.stderr


def test_numbers_that_a_precision_cannot_hold_are_refused(tmp_path):
    adapter = mixed_adapter()
    adapter.pairs[0].up.mul_(1e6)
    save_adapter(tmp_path / "a.safetensors", adapter)
    with pytest.raises(AdapterError, match="too large for fp16"):
        rite.convert(tmp_path / "a.safetensors", "kohya", dtype="fp16")
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    rite.convert(tmp_path / "a.safetensors", "kohya", dtype="bf16")


def test_alpha_is_exact_in_half_precision(tmp_path):
    adapter = mixed_adapter()
    adapter.pairs[:] = [pair(f"{BLOCK}_attn2_to_k", into=768, rank=3, alpha=0.7)]
    save_adapter(tmp_path / "a.safetensors", adapter)
    out = rite.convert(tmp_path / "a.safetensors", "kohya", dtype="fp16").path
    with safe_open(out, "pt") as file:
        alpha = file.get_tensor(f"{BLOCK}_attn2_to_k.alpha")
    assert alpha.dtype == torch.float32 and float(alpha) == pytest.approx(0.7, rel=1e-7)


@pytest.mark.parametrize(
    "concepts", ["{", "[" * 9999, "7", '["a"]', '[{"file": "a"}]', '[{"weight": "1"}]']
)
def test_foreign_concept_entries_in_headers_are_ignored(tmp_path, concepts):
    path = tmp_path / "a.safetensors"
    save_adapter(path, mixed_adapter())
    save_file(load_file(path), path, {"rite_concepts": concepts, "rite_trigger": "<t>"})
    assert load_adapter(path).info.concepts == "" and load_adapter(path).info.trigger == "<t>"


def test_embeddings_alone_keep_the_precision_too(tmp_path):
    rows = torch.randn(2, 8).half()
    save_file({"emb_params": rows}, tmp_path / "dog.safetensors", {"author": "someone"})
    export = rite.convert(tmp_path / "dog.safetensors", "kohya", tmp_path / "out.safetensors")
    assert export.dtype == "fp16"
    assert torch.equal(load_file(export.embeddings[0])["emb_params"], rows)
    assert read_header(export.path)["author"] == "someone"
