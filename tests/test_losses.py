"""LoHa and LoKr act as what they are, and what is cut off is told, and refused above 1 %."""

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from safetensors.torch import load_file, save_file

import rite_diffusion as rite
from random_adapters import random_adapter
from rite_diffusion.adapters import AdapterInfo, load_adapter, save_adapter
from rite_diffusion.adapters.attach import adaptable_layers
from rite_diffusion.adapters.delta import delta_weight
from rite_diffusion.backbones.source import load_backbone
from rite_diffusion.errors import AdapterError, FusionError
from rite_diffusion.fusion.members import Member
from rite_diffusion.fusion.merge import merge_with_loss
from rite_diffusion.fusion.settings import FusionSettings
from rite_diffusion.generation.denoise import sample

logging.getLogger("LyCORIS").setLevel(logging.ERROR)
ONE = {"steps": 2, "width": 64, "height": 64, "guidance": 10.0}


def lycoris_file(path: Path, backbone, module: type, seed: int, ends, **settings):
    """A file of LyCORIS's own modules on the base's layers; returns delta W by module name."""
    torch.manual_seed(seed)
    tensors, deltas = {}, {}
    for name, (component, inner) in adaptable_layers(backbone).items():
        if not name.endswith(ends):
            continue
        layer = backbone.components[component].get_submodule(inner)
        made = module(name, layer, 1.0, alpha=2, **settings)
        with torch.no_grad():
            for part in made.parameters():
                part.copy_(torch.randn_like(part) * 0.25)
        tensors |= {f"{name}.{k}": v.contiguous() for k, v in made.custom_state_dict().items()}
        deltas[name] = made.get_weight(made.shape).detach()
    save_file(tensors, path)
    return deltas


@pytest.fixture(scope="module")
def made_by_lycoris(tiny_folder, tmp_path_factory):
    """A LoHa of rank 64 and a LoKr of a whole factor, with their delta W, of one base."""
    folder, backbone = tmp_path_factory.mktemp("lycoris"), load_backbone(str(tiny_folder))
    kinds = {
        "loha": (LohaModule, ("attn2_to_k", "attn2_to_v", "conv1"), {"lora_dim": 4}),
        "lokr": (LokrModule, ("attn2_to_k", "attn1_to_q"), {"lora_dim": 100, "factor": 4}),
    }
    return {
        kind: (folder / f"{kind}.safetensors",
               lycoris_file(folder / f"{kind}.safetensors", backbone, module, seed, ends, **how))
        for seed, (kind, (module, ends, how)) in enumerate(kinds.items())
    }  # fmt: skip


def test_a_picture_equals_that_of_the_literal_updates(made_by_lycoris, tiny_folder):
    files = [f"{file}:8" for file, _ in made_by_lycoris.values()]
    [drawn] = rite.generate("a cat", adapters=files, base=str(tiny_folder), **ONE)
    backbone = load_backbone(str(tiny_folder))
    [plain] = sample(backbone, ["a cat"], [0], **ONE)
    for name, (component, path) in adaptable_layers(backbone).items():
        weight = backbone.components[component].get_submodule(path).weight
        for _, deltas in made_by_lycoris.values():
            if name in deltas:
                weight.data += 8 * deltas[name].reshape(weight.shape)
    [wanted] = sample(backbone, ["a cat"], [0], **ONE)
    found, literal, before = (np.asarray(image, int) for image in (drawn, wanted, plain))
    apart, moved = np.abs(found - literal).max(), np.abs(found - before).max()
    assert apart <= 1 and moved > 20, (apart, moved)


def test_a_fusion_equals_the_sum_of_the_literal_updates(made_by_lycoris, tmp_path):
    (loha, first), (lokr, second) = made_by_lycoris["loha"], made_by_lycoris["lokr"]
    out = rite.fuse([f"{loha}:0.5", f"{lokr}:2"], method="weighted", out=tmp_path / "f.safetensors")
    fused = {pair.name: delta_weight(pair) for pair in load_adapter(out).pairs}
    assert fused.keys() == first.keys() | second.keys()
    for name, found in fused.items():
        wanted = torch.zeros(found.shape)
        for weight, deltas in ((0.5, first), (2.0, second)):
            if name in deltas:
                wanted += weight * deltas[name].reshape(found.shape)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def literal_loss(deltas: dict, rank: int) -> float:
    """|cut - whole| / |whole| over all matrices, by dense SVDs."""
    lost = size = 0.0
    for delta in deltas.values():
        values = torch.linalg.svdvals(delta.double().flatten(1))
        lost += values[rank:].square().sum().item()
        size += values.square().sum().item()
    return (lost / size) ** 0.5


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_convert_truncates_to_the_rank_and_reports_the_loss(made_by_lycoris, tmp_path, kind):
    file, deltas = made_by_lycoris[kind]
    out = tmp_path / "out.safetensors"
    whole = rite.convert(file, "kohya", out)
    assert whole.lossy == {} and max(load_adapter(out).ranks()) > 6
    out.unlink()
    loss = literal_loss(deltas, 6)
    with pytest.raises(AdapterError, match=rf"cut to rank 6: relative error {loss:.2g}.*larger"):
        rite.convert(file, "kohya", out, rank=6)
    assert not list(tmp_path.iterdir())
    cut = rite.convert(file, "kohya", out, rank=6, allow_loss=True)
    [found] = cut.lossy.values()
    assert found == pytest.approx(loss, rel=1e-6) and loss > 0.01
    written = {pair.name: pair for pair in load_adapter(out).pairs}
    assert max(pair.rank for pair in written.values()) == 6
    lost = sum((delta_weight(written[k]) - d.reshape(delta_weight(written[k]).shape)).norm() ** 2
               for k, d in deltas.items())  # fmt: skip
    size = sum(d.norm() ** 2 for d in deltas.values())
    assert float(lost / size) ** 0.5 == pytest.approx(loss, rel=1e-4)


def test_convert_and_fuse_commands_print_the_loss_or_refuse_it(made_by_lycoris, tmp_path, command):
    file, deltas = made_by_lycoris["loha"]
    line = ["convert", file, "--to", "kohya", "--out", tmp_path / "a.safetensors", "--rank", 6]
    refused = command(*line)
    assert refused.returncode == 2 and "--allow-loss" in refused.stderr
    assert not list(tmp_path.iterdir())
    done = command(*line, "--allow-loss")
    assert done.returncode == 0, done.stderr
    error = f"relative error {literal_loss(deltas, 6):.2g}"
    assert f"modules are cut to rank 6: {error}" in done.stdout
    fused = command("fuse", tmp_path / "a.safetensors", "--rank", 2, "--out", tmp_path / "b")
    assert fused.returncode == 2
    small = {name: delta_weight(pair) for name, pair in _pairs(tmp_path / "a.safetensors")}
    error = f"cut in rank: relative error {literal_loss(small, 2):.2g}"
    out = tmp_path / "b.safetensors"
    fused = command("fuse", tmp_path / "a.safetensors", "--rank", 2, "--allow-loss", "--out", out)
    assert fused.returncode == 0 and error in fused.stderr


def _pairs(file: Path):
    return [(pair.name, pair) for pair in load_adapter(file).pairs]


@pytest.mark.parametrize("change", [{"rank": 0}, {"rank": -1}, {"rank": 5000}])
def test_invalid_ranks_are_refused(made_by_lycoris, tmp_path, change):
    with pytest.raises(AdapterError, match="not between 1 and"):
        rite.convert(made_by_lycoris["loha"][0], "kohya", tmp_path / "a.safetensors", **change)


def test_truncating_a_dora_accounts_for_its_norms(tmp_path, adapters):
    tensors = load_file(adapters[1])
    up = next(key for key in tensors if key.endswith("lora_up.weight"))
    tensors[up.replace("lora_up.weight", "dora_scale")] = torch.ones(len(tensors[up]), 1)
    save_file(tensors, adapters[1])
    out = tmp_path / "b.safetensors"
    with pytest.raises(AdapterError, match="1 layers to cut are DoRA"):
        rite.convert(adapters[1], "kohya", out, rank=2, allow_loss=True)
    assert rite.convert(adapters[1], "kohya", out, rank=4).lossy == {}


@pytest.mark.parametrize("method", ["concat", "weighted", "svd", "ties", "dare", "knots"])
def test_every_fusion_method_reports_its_loss(pocket, method):
    members = [
        Member(replace(random_adapter(pocket, 3, seed=seed), info=AdapterInfo(word)), 1.0, Path())
        for seed, word in enumerate(("<a>", "<b>"))
    ]
    dense = {"error": 1e-9} if method == "svd" else {"rank": 4096}
    whole = merge_with_loss(members, method, FusionSettings(**dense))
    assert whole.loss < 1e-6
    deltas = {pair.name: delta_weight(pair) for pair in whole.adapter.pairs}
    cut = merge_with_loss(members, method, FusionSettings(rank=2))
    assert cut.adapter.ranks() == [2]
    assert cut.loss == pytest.approx(literal_loss(deltas, 2), rel=1e-4)
    usual = merge_with_loss(members, method, FusionSettings(rank=6))
    assert (usual.loss > 0.01) == (method in ("ties", "dare"))


def test_a_requested_error_budget_is_not_refused(adapters, tmp_path, capsys):
    out = tmp_path / "f.safetensors"
    with pytest.raises(FusionError, match="cut in rank.*--allow-loss"):
        rite.fuse(adapters, method="concat", rank=2, out=out)
    assert not out.exists() and not capsys.readouterr().err
    rite.fuse(adapters, method="svd", error=0.3, out=out)
    assert "cut in rank: relative error 0." in capsys.readouterr().err
    with pytest.raises(FusionError, match="cut in rank"):
        rite.fuse(adapters, method="svd", error=0.3, rank=1, out=out)


def test_a_sheet_reports_weights_without_effect_and_losses(adapters, tiny_folder, capsys):
    silent = adapters[0].with_name("silent.safetensors")
    adapter = load_adapter(adapters[0])
    pairs = [replace(pair, scale=0.0) for pair in adapter.pairs]
    save_adapter(silent, replace(adapter, pairs=pairs))
    settings = {"base": str(tiny_folder), "steps": 1, "width": 64, "height": 64}
    rite.grid(["a cat"], adapters=[f"{adapters[0]}:0", str(silent)], **settings)
    told = capsys.readouterr().err.splitlines()
    count = len(adapter.pairs)
    assert "0.safetensors: its layers have no effect at weight 0" in told
    assert (
        f"silent.safetensors: {count} of {count} layers have no effect, as their alpha is 0" in told
    )
    heard = list[str]()
    both = f"{adapters[0]}+{adapters[1]}"
    rite.grid(["a cat"], adapters=[both], methods=["ties"], on_note=heard.append, **settings)
    [line] = heard
    assert line.startswith("ties of 0.safetensors + 1.safetensors: relative error 0.")
