import json
import os
import stat
import struct
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from predictions import prediction, prediction_in_diffusers
from random_adapters import random_adapter
from rite_diffusion.adapters import Adapter, AdapterInfo, load_adapter, save_adapter
from rite_diffusion.adapters.attach import (
    adaptable_layers,
    attach,
    detach,
    inject,
    read_pairs,
    set_weight,
)
from rite_diffusion.adapters.storage import write_tensors
from rite_diffusion.backbones.families import POCKET
from rite_diffusion.backbones.source import load_backbone
from rite_diffusion.errors import AdapterError
from shared_bases import shared_base


def test_save_and_load_is_bit_exact(tmp_path, pocket):
    adapter = random_adapter(pocket)
    save_adapter(tmp_path / "a.safetensors", adapter)
    loaded = load_adapter(tmp_path / "a.safetensors")
    assert loaded.info == adapter.info
    before = {pair.name: pair for pair in adapter.pairs}
    assert before.keys() == {pair.name for pair in loaded.pairs}
    for pair in loaded.pairs:
        assert torch.equal(pair.down, before[pair.name].down)
        assert torch.equal(pair.up, before[pair.name].up)
        assert pair.scale == before[pair.name].scale


def test_saving_respects_the_umask_and_leaves_no_temporary_file(tmp_path, pocket):
    old = os.umask(0o027)
    try:
        save_adapter(tmp_path / "a.safetensors", random_adapter(pocket))
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == 0o640
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_fresh_lora_changes_nothing(pocket):
    before = prediction(pocket)
    inject(pocket, "fresh", {n: pocket.lora_targets(n) for n in pocket.components}, 4, 4.0)
    assert torch.equal(prediction(pocket), before)
    assert all(pair.up.abs().max() == 0 for pair in read_pairs(pocket, "fresh"))


def test_attached_equals_merged(pocket):
    adapter = random_adapter(pocket)
    attach(pocket, adapter, "a", 0.7)
    attached = prediction(pocket)
    merged = load_backbone("pocket")
    homes = adaptable_layers(merged)
    for pair in adapter.pairs:
        component, path = homes[pair.name]
        weight = merged.components[component].get_submodule(path).weight
        weight.data += 0.7 * pair.scale * pair.up @ pair.down
    torch.testing.assert_close(attached, prediction(merged), rtol=1e-4, atol=1e-4)
    assert (attached - prediction(load_backbone("pocket"))).abs().max() > 1e-2


def test_two_adapters_add_up_and_detaching_restores_every_bit(pocket):
    state = {name: part.state_dict() for name, part in pocket.components.items()}
    plain = prediction(pocket)
    first, second = random_adapter(pocket), random_adapter(pocket, rank=2, seed=1)
    attach(pocket, first, "first")
    alone = prediction(pocket)
    attach(pocket, second, "second", 0.5)
    both = prediction(pocket)
    set_weight(pocket, "second", 0.0)
    torch.testing.assert_close(prediction(pocket), alone, rtol=1e-5, atol=1e-5)
    set_weight(pocket, "second", 0.5)
    assert torch.equal(prediction(pocket), both)
    detach(pocket, "first")
    detach(pocket, "second")
    assert torch.equal(prediction(pocket), plain)
    for name, part in pocket.components.items():
        assert part.state_dict().keys() == state[name].keys()
        assert all(torch.equal(value, state[name][key]) for key, value in part.state_dict().items())


def test_plain_diffusers_reads_the_file_at_the_same_strength(tmp_path, pocket):
    adapter = random_adapter(pocket, rank=4, alpha=2.0)
    save_adapter(tmp_path / "a.safetensors", adapter)
    attach(pocket, adapter, "a")
    theirs = prediction_in_diffusers(POCKET, tmp_path / "a.safetensors")
    torch.testing.assert_close(theirs, prediction(pocket), rtol=1e-4, atol=1e-4)


def test_plain_diffusers_reads_ranks_and_scales_of_all_kinds(tmp_path, pocket):
    one, other = random_adapter(pocket, rank=4, alpha=2.0), random_adapter(pocket, rank=6, seed=1)
    pairs = [*one.pairs[::2], *other.pairs[1::2]]
    save_adapter(tmp_path / "a.safetensors", Adapter(pairs, one.info))
    attach(pocket, Adapter(pairs, one.info), "a")
    theirs = prediction_in_diffusers(POCKET, tmp_path / "a.safetensors")
    torch.testing.assert_close(theirs, prediction(pocket), rtol=1e-4, atol=1e-4)


def _break(path, **changes):
    tensors = load_file(path)
    for key, value in changes.items():
        name = next(k for k in tensors if k.endswith(key.replace("__", ".")))
        tensors.pop(name)
        if value is not None:
            tensors[name] = value
    save_file(tensors, path)


DAMAGE = {
    "a pickle": lambda path: path.write_bytes(b"\x80\x04cos\nsystem\n"),
    "web page": lambda path: path.write_text("<!DOCTYPE html><html>404</html>"),
    "LFS pointer": lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"),
    "empty or cut off": lambda path: path.write_bytes(b""),
    "is damaged": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:100]),
    "damaged header": lambda path: path.write_bytes(struct.pack("<Q", 10) + b"not json!!" * 9),
    "NaN": lambda path: _break(path, lora_up__weight=torch.full((192, 4), torch.nan)),
    "only one of its two": lambda path: _break(path, lora_up__weight=None),
    "do not fit": lambda path: _break(path, lora_up__weight=torch.zeros(7, 9)),
    "are unknown": lambda path: save_file(
        {"strange": torch.zeros(2), "stranger": torch.zeros(2)}, path
    ),
    "no adapter file": lambda path: path.unlink(),
}


@pytest.mark.parametrize("words", DAMAGE)
def test_damaged_and_foreign_files_are_refused(tmp_path, pocket, words):
    path = tmp_path / "a.safetensors"
    save_adapter(path, random_adapter(pocket))
    DAMAGE[words](path)
    with pytest.raises(AdapterError, match=words):
        load_adapter(path)


def test_a_header_that_names_a_tensor_twice_is_refused(tmp_path):
    entry = json.dumps({"dtype": "F32", "shape": [1], "data_offsets": [0, 4]})
    header = f'{{"a.alpha": {entry}, "a.alpha": {entry}}}'.encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
    with pytest.raises(AdapterError, match="twice"):
        load_adapter(path)


def test_an_adapter_of_another_base_is_refused_without_changing_the_model(pocket, tiny_folder):
    other = shared_base(str(tiny_folder))
    before = prediction(pocket)
    with pytest.raises(AdapterError, match="another"):
        attach(pocket, random_adapter(other), "other")
    assert torch.equal(prediction(pocket), before)
    assert not any("lora" in key for key in pocket.unet.state_dict())


def test_equal_adapters_give_identical_files(tmp_path):
    facts = {f"fact {number}": "é" * number for number in range(20)}
    tensors = {"b": torch.ones(3, 5), "a": torch.zeros(2)}
    contents = set()
    for order in (1, -1):
        for number in range(4):
            header = dict(list(facts.items())[::order])
            write_tensors(tmp_path / f"{order}{number}.safetensors", tensors, header)
            contents.add((tmp_path / f"{order}{number}.safetensors").read_bytes())
    assert len(contents) == 1
    with safe_open(tmp_path / "10.safetensors", "pt") as file:
        assert file.metadata() == facts | {"format": "pt"}
        assert all(torch.equal(file.get_tensor(name), value) for name, value in tensors.items())


def test_reading_adapters_imports_no_model_libraries(tmp_path):
    path = tmp_path / "a.safetensors"
    save_adapter(path, Adapter([], AdapterInfo(trigger="<t>"), {"<t>": torch.ones(1, 1, 4)}))
    code = (
        "import sys\n"
        "from rite_diffusion.adapters import load_adapter\n"
        f"assert load_adapter({str(path)!r}).info.trigger == '<t>'\n"
        "print([m for m in ('peft', 'diffusers', 'transformers') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"
