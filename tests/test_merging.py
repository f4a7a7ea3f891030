import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import rite_diffusion as rite
from fusion_layers import dense, random_member
from predictions import prediction, prediction_in_diffusers
from rite_diffusion.adapters import load_adapter
from rite_diffusion.adapters.attach import attach, detach
from rite_diffusion.api.fuse import fuse_and_report
from rite_diffusion.api.sketch import with_sketches
from rite_diffusion.cli.app import app
from rite_diffusion.errors import FusionError, RiteError
from rite_diffusion.fusion.conflict_sheet import conflict_sheet, layer_label
from rite_diffusion.fusion.measure import measure_concept
from rite_diffusion.fusion.members import Member, digest_of
from rite_diffusion.fusion.merge import merge
from rite_diffusion.fusion.prompts import concept_prompts
from rite_diffusion.fusion.report import report_on
from rite_diffusion.fusion.settings import FusionSettings
from rite_diffusion.fusion.sketch import load_sketch, sketch_path
from rite_diffusion.fusion.statistics import Drawing
from shared_bases import shared_base

FEW = Drawing(steps=1)


def test_a_plain_sum_equals_attaching_both(adapters, tiny, tmp_path):
    out = rite.fuse(
        [f"{adapters[0]}:0.5", adapters[1]],
        method="concat",
        out=tmp_path / "f.safetensors",
    )
    plain = prediction(tiny)
    attach(tiny, load_adapter(adapters[0]), "a", 0.5)
    attach(tiny, load_adapter(adapters[1]), "b")
    together = prediction(tiny)
    for name in ("a", "b"):
        detach(tiny, name)
    attach(tiny, load_adapter(out), "f")
    torch.testing.assert_close(prediction(tiny), together, rtol=1e-3, atol=1e-4)
    assert (together - plain).abs().max() > 1e-2


def test_plain_diffusers_reads_a_fused_file(adapters, tiny_folder, tmp_path):
    out = rite.fuse(adapters, base=str(tiny_folder), drawing=FEW, out=tmp_path / "f.safetensors")
    ours = shared_base(str(tiny_folder))
    attach(ours, load_adapter(out), "f")
    theirs = prediction_in_diffusers(tiny_folder, out)
    torch.testing.assert_close(theirs, prediction(ours), rtol=1e-3, atol=1e-3)


def test_fusing_with_sketches_needs_no_base_and_is_nearly_the_same(adapters, tiny_folder, tmp_path):
    drawn = rite.fuse(adapters, base=str(tiny_folder), drawing=FEW, out=tmp_path / "d.safetensors")
    for path in adapters:
        rite.sketch(path, base=str(tiny_folder), drawing=FEW, directions=400)
    with_sketches = rite.fuse(adapters, base="nowhere", out=tmp_path / "s.safetensors")
    expected, sketches = dense(load_adapter(drawn)), [load_sketch(sketch_path(p)) for p in adapters]
    for name, update in dense(load_adapter(with_sketches)).items():
        for sketch in sketches:  # the updates may differ where no input goes
            root = sketch.concept[name].root().mT
            off = ((update - expected[name]) @ root).norm()
            assert off < 0.01 * (expected[name] @ root).norm()


def test_refining_solves_on_what_the_fused_adapter_sees(adapters, tiny_folder, tmp_path):
    settings = {"base": str(tiny_folder), "drawing": FEW}
    first = load_adapter(rite.fuse(adapters, out=tmp_path / "first.safetensors", **settings))
    counts = []
    again = load_adapter(
        rite.fuse(
            adapters, out=tmp_path / "again.safetensors", refine=1,
            progress=lambda done, total: counts.append((done, total)), **settings
        )
    )  # fmt: skip
    backbone = shared_base(str(tiny_folder))
    members = [Member(load_adapter(path), 1.0, path) for path in adapters]
    alone = with_sketches(members, lambda: backbone, FEW, lambda done, total: None)
    seen = []
    for member in alone:
        prompts = concept_prompts(member.adapter.info, member.file)
        names = [pair.name for pair in member.adapter.pairs]
        grams = measure_concept(backbone, first, prompts, names, FEW)
        seen.append(replace(member, sketch=replace(member.sketch, concept=grams)))
    expected = dense(merge(seen, "gram", FusionSettings()))
    for name, update in dense(again).items():
        torch.testing.assert_close(update, expected[name], rtol=1e-3, atol=1e-5)
    assert any((dense(first)[n] - e).norm() > 1e-3 * e.norm() for n, e in expected.items())
    assert counts[-1] == (10, 10)  # of its own round: two concepts, five prompts each


def test_refining_needs_triggers_and_a_whole_number(adapters, tiny_folder, tmp_path):
    with pytest.raises(FusionError, match="'refine' = 1.5"):
        rite.fuse(adapters, refine=1.5, out=tmp_path / "f.safetensors")
    with pytest.raises(FusionError, match="'refine' = -1"):
        rite.fuse(adapters, refine=-1, out=tmp_path / "f.safetensors")
    summed = rite.fuse(adapters, method="concat", refine=3, base="nowhere",
                       out=tmp_path / "f.safetensors")  # fmt: skip
    plain = rite.fuse(adapters, method="concat", out=tmp_path / "g.safetensors")
    assert digest_of(load_adapter(summed)) == digest_of(load_adapter(plain))


def test_an_outdated_sketch_is_refused(adapters, tiny_folder, tmp_path):
    rite.sketch(adapters[0], base=str(tiny_folder), drawing=FEW)
    adapters[0].with_suffix(".sketch.safetensors").rename(tmp_path / "1.sketch.safetensors")
    with pytest.raises(FusionError, match="another version of 1.safetensors"):
        rite.fuse(adapters, base=str(tiny_folder), out=tmp_path / "f.safetensors")
    assert not (tmp_path / "f.safetensors").exists()


def test_the_conflict_report_has_errors_before_and_after(tmp_path):
    members = [random_member(seed) for seed in range(3)]
    fused = merge(members, "gram", FusionSettings(ridge=1e-6))
    report = report_on(members, fused)
    assert report.concepts == ["<0>", "<1>", "<2>"]
    assert all(report.crosstalk[i][i] == pytest.approx(1) for i in range(3))
    assert all(a < 0.6 * b for a, b in zip(report.after, report.before, strict=True))
    summed = report_on(members, merge(members, "concat", FusionSettings()))
    assert summed.after == pytest.approx(report.before)
    layer = report.layers[0]
    one, two = (dense(m.adapter)[layer.name] for m in members[:2])
    inputs = members[0].sketch.concept[layer.name].root().mT
    expected = (two @ inputs).norm() / (one @ inputs).norm()
    assert layer.crosstalk[0][1] == pytest.approx(expected.item(), rel=1e-5)


def test_the_reports_sheet_is_drawn_for_concepts_that_share_no_layer():
    first, second = random_member(0), random_member(1)
    names = sorted(first.pairs)
    half = [
        replace(m, adapter=replace(m.adapter, pairs=[m.pairs[n] for n in names[part::2]]))
        for part, m in enumerate((first, second))
    ]
    report = report_on(half, merge(half, "concat", FusionSettings()))
    json.dumps(report.as_dict(), allow_nan=False)
    assert conflict_sheet(report, []).width == 1120
    assert layer_label(names[0]) == "text layers_0_self_attn_q_proj"


def test_fuse_and_report_writes_adapter_figures_and_sheet(adapters, tiny_folder, tmp_path):
    outcome = fuse_and_report(
        adapters, base=str(tiny_folder), drawing=FEW, out=tmp_path / "f.safetensors"
    )
    assert {path.name for path in tmp_path.glob("f.*")} == {
        "f.safetensors", "f.report.json", "f.report.png"
    }  # fmt: skip
    figures = json.loads(outcome.json.read_text())
    assert figures["concepts"] == ["<0>", "<1>"] and len(figures["layers"]) == len(
        load_adapter(adapters[0]).pairs
    )
    sheet = np.asarray(Image.open(outcome.sheet))
    assert sheet.std() > 10


def test_the_command_fuses_and_inspects(adapters, tmp_path, command):
    out = tmp_path / "f.safetensors"
    done = command("fuse", adapters[0], f"{adapters[1]}:0.5", "--method", "weighted", "--rank", 3,
                   "--out", out, "--allow-loss")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "concepts    <0>, <1>" in done.stdout
    shown = command("inspect", out).stdout
    concept = "<1>, , from 1.safetensors at weight 0.5"
    assert all(words in shown for words in ("fused: weighted", concept, "rank             3"))


def test_training_can_leave_a_sketch(photos, tiny_folder, tmp_path, command):
    done = command(
        "train", photos, "--trigger", "<thing>", "--class", "toy", "--base", tiny_folder, "--steps",
        1, "--rank", 2, "--out", tmp_path / "run", "--set", "previews.every=0", "--sketch",
        "--set", "batch=1", "--set", "precision=fp32", "--set", "prior.weight=0",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    path = tmp_path / "run/adapter.safetensors"
    assert load_sketch(sketch_path(path)).metadata.adapter == digest_of(load_adapter(path))


def test_running_out_of_memory_for_statistics_says_what_helps(
    adapters, tiny_folder, tmp_path, monkeypatch
):
    def collect(*arguments):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr("rite_diffusion.fusion.measure.collect", collect)
    with pytest.raises(FusionError, match="one adapter after the other"):
        rite.fuse(adapters, base=str(tiny_folder), out=tmp_path / "f.safetensors")
    assert not (tmp_path / "f.safetensors").exists()


BAD = {
    "same adapter": ["{0}", "{0}"],
    "weight 0": ["{0}", "{1}:0"],
    "weight 99": ["{0}", "{1}:99"],
    "no adapter file": ["{0}", "nowhere.safetensors"],
    "no method 'gran'": ["{0}", "{1}", "--method", "gran"],
    "unknown setting 'rink'": ["{0}", "{1}", "--set", "rink=3"],
    "'trim' = 'x'": ["{0}", "{1}", "--set", "trim=x"],
    "'rank' = 0": ["{0}", "{1}", "--rank", "0"],
    "is what is read": ["{0}", "{1}", "--out", "{0}"],
    "is not a .safetensors file": ["{0}", "{1}", "--out", "f.bin"],
    "pass its path as --base": ["{0}", "{1}"],
    "rank or an error": ["{0}", "{1}", "--method", "svd"],
}


@pytest.mark.parametrize("words", BAD)
def test_invalid_fusions_are_refused_and_write_nothing(words, adapters, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = {path: path.read_bytes() for path in adapters}
    arguments = [item.format(*adapters) for item in BAD[words]]
    result = CliRunner().invoke(app, ["fuse", *arguments])
    assert isinstance(result.exception, RiteError) and words in str(result.exception)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_invalid_fuse_commands_are_errors_of_one_line(adapters, command):
    done = command("fuse", adapters[0], adapters[0])
    assert done.returncode == 2 and "holds the same adapter" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
