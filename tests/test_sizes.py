"""Sizes of bases from their files' headers, and the refusal of those that do not fit."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open

from command_line import run_command
from flow_models import PIPELINES
from rite_diffusion.backbones import sizes, source
from rite_diffusion.backbones.sizes import (
    describe_bytes,
    part_sizes,
    refuse_too_large,
    stored_bytes,
)
from rite_diffusion.config import MemorySection, memory_settings
from rite_diffusion.errors import BackboneError

CPU = torch.device("cpu")


def counted(pipeline):
    """Number of weights of a pipeline's parts, from the modules."""
    parts = {
        name: part for name, part in pipeline.components.items() if hasattr(part, "parameters")
    }
    return {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}


@pytest.fixture(scope="module")
def flow(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sizes") / "flow"
    pipeline = PIPELINES["z-image"]()
    pipeline.save_pretrained(folder, max_shard_size="100KB")
    return folder, counted(pipeline)


def test_sizes_are_those_of_the_modules(flow):
    """Also of files in shards, and beside a variant in half precision."""
    folder, wanted = flow
    assert len(list((folder / "transformer").glob("*-of-*.safetensors"))) > 1
    file = next((folder / "vae").glob("*.safetensors"))
    copy = file.with_name("diffusion_pytorch_model.fp16.safetensors")
    shutil.copy(file, copy)
    found = part_sizes(str(folder))
    copy.unlink()
    assert found == wanted


def test_sizes_of_pocket_and_of_a_denoisers_file(flow):
    folder, wanted = flow
    assert set(part_sizes("pocket")) == {"unet", "text_encoder", "vae"}
    file = next((folder / "vae").glob("*.safetensors"))
    found = part_sizes(f"{file}@{folder}")
    assert found == wanted | {"transformer": wanted["vae"]}
    assert part_sizes(str(file)) == {"checkpoint": wanted["vae"]}


def test_a_hub_model_is_asked_for_headers_only(flow, tmp_path, monkeypatch):
    folder, wanted = flow
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    shutil.copy(folder / "model_index.json", snapshot)
    asked = []

    class Api:
        def model_info(self, model):
            paths = [path for path in folder.rglob("*") if path.is_file()]
            names = [path.relative_to(folder).as_posix() for path in paths]
            return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in names])

        def parse_safetensors_file_metadata(self, model, path):
            asked.append(path)
            with safe_open(folder / path, "pt") as file:
                counts = [file.get_tensor(key).numel() for key in file.keys()]
            return SimpleNamespace(parameter_count={"F32": sum(counts)})

    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    cached = str(snapshot / "model_index.json")
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *names: cached)
    assert part_sizes("somebody/flow") == wanted
    assert all(path.endswith(".safetensors") for path in asked)


@pytest.mark.parametrize("base", ["nobody/nothing", "no-such-folder", "a/b/c", ""])
def test_nothing_is_known_of_bases_that_are_not_here(base, monkeypatch):
    import huggingface_hub

    def refuse(*arguments, **options):
        raise AssertionError("asked the hub")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    assert part_sizes(base) == {}


def test_a_base_larger_than_memory_is_refused_before_it_is_loaded(flow, monkeypatch):
    folder, wanted = flow
    needed = 4 * sum(wanted.values())

    def refuse(*arguments):
        raise AssertionError("loaded")

    monkeypatch.setattr(source, "open_parts", refuse)
    monkeypatch.setattr(sizes, "system_memory", lambda: needed - 1)
    with pytest.raises(BackboneError, match=r"GB: .*transformer.*this machine has.*bf16 or fp16"):
        source.load_backbone(str(folder), "fp32", CPU)
    monkeypatch.setattr(sizes, "system_memory", lambda: needed)
    refuse_too_large(str(folder), torch.float32, CPU)
    monkeypatch.setattr(sizes, "system_memory", lambda: needed // 2 - 1)
    with pytest.raises(BackboneError, match=r"has .* GB\. Store them in 8 bits.*smaller base\."):
        refuse_too_large(str(folder), torch.bfloat16, CPU)
    small = memory_settings({"weights": "int8", "encoder_weights": "int8"})
    refuse_too_large(str(folder), torch.bfloat16, CPU, small)


def test_a_containers_limit_counts(tmp_path, monkeypatch):
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(sizes, "CGROUP", limit)
    whole = sizes.system_memory()
    for text, wanted in (("max\n", whole), ("1000000\n", 1_000_000)):
        limit.write_text(text)
        assert sizes.system_memory() == wanted


def test_sizes_are_told_with_the_largest_part_first():
    found = {"vae": 10**8, "transformer": 6 * 10**9, "text_encoder": 10**9}
    full, small = MemorySection(), MemorySection(weights="int8", encoder_weights="int8")
    parts = stored_bytes(found, torch.bfloat16, full)
    assert describe_bytes(parts) == "14.2 GB: transformer 12.0, text_encoder 2.0, vae 0.2"
    parts = stored_bytes(found, torch.bfloat16, small)
    assert describe_bytes(parts) == "7.2 GB: transformer 6.0, text_encoder 1.0, vae 0.2"


def test_a_damaged_index_is_left_to_the_loader(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps(["no", "table"]))
    assert part_sizes(str(tmp_path)) == {}


def test_the_report_tells_a_large_bases_sizes_first(flow, photos, monkeypatch):
    folder, wanted = flow
    found = {name: 100_000 * count for name, count in wanted.items()}
    monkeypatch.setattr("rite_diffusion.cli.output.part_sizes", lambda base: found)
    monkeypatch.setattr(sizes, "system_memory", lambda: 0)
    done = run_command(
        "train", photos, "--trigger", "<a>", "--class", "toy", "--base", folder, "--dry-run"
    )
    assert done.returncode == 2 and "has 0.0 GB" in done.stderr
    assert re.search(r"^weights +\d.* GB: .*transformer.* in bf16$", done.stdout, re.MULTILINE)
