"""What commands write beside other files: nothing that was not named is lost."""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import rite_diffusion as rite
from random_adapters import mixed_adapter
from rite_diffusion.adapters import load_adapter, save_adapter
from rite_diffusion.api.publish import write_card
from rite_diffusion.errors import OutputError, PathError, RunError, StudioError
from rite_diffusion.files.writing import check_outputs, folder_output, printable, user_path
from rite_diffusion.generation.output import write_next
from rite_diffusion.studio import fusing, library
from rite_diffusion.studio.workspace import Workspace
from rite_diffusion.training.run_folder import RunFolder


def content(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder: files by their bytes, folders as None."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture
def dog(tmp_path) -> Path:
    """An adapter called like its word."""
    path = tmp_path / "dog.safetensors"
    save_adapter(path, replace(mixed_adapter(), tokens={"<dog>": torch.randn(1, 2, 8)}))
    return path


@pytest.mark.parametrize("to", ["kohya", "diffusers", "peft", "comfyui"])
def test_an_export_does_not_change_source_and_other_files(dog, to):
    shutil.copy(dog, dog.with_name("<dog>.safetensors"))
    before = content(dog.parent)
    export = rite.convert(dog, to)
    after = content(dog.parent)
    assert {name: after[name] for name in before} == before
    assert len(load_adapter(export.path).pairs) == len(load_adapter(dog).pairs)
    assert export.embeddings == [dog.parent / f"dog-{to}-embeddings" / "dog.safetensors"]
    rows = load_file(export.embeddings[0])["emb_params"]
    assert torch.equal(rows, load_adapter(dog).tokens["<dog>"][0])


def test_an_export_named_like_its_embedding_is_complete(dog):
    out = dog.with_name("fox.safetensors")
    save_adapter(dog, replace(load_adapter(dog), tokens={"<fox>": torch.randn(1, 2, 8)}))
    rite.convert(dog, "kohya", out)
    assert len(load_adapter(out).pairs) == 8
    assert [path.name for path in dog.with_name("fox-embeddings").iterdir()] == ["fox.safetensors"]


def test_embeddings_with_clashing_file_names_get_separate_files(dog):
    words = {word: torch.randn(1, 2, 8) for word in ("<a b>", "ab", "<AB>", "ж" * 80, "ж" * 79)}
    save_adapter(dog, replace(mixed_adapter(), tokens=words))
    export = rite.convert(dog, "diffusers")
    found = [load_file(path)["emb_params"] for path in export.embeddings]
    assert len({path.name.casefold() for path in export.embeddings}) == len(found) == 5
    wanted = load_adapter(dog).tokens.values()
    assert all(torch.equal(one, other[0]) for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize("taken", ["dog-kohya.safetensors", "dog-kohya-embeddings/dog.safetensors"])
def test_an_export_replaces_default_names_only_with_overwrite(dog, taken):
    place = dog.parent / taken
    place.parent.mkdir(exist_ok=True)
    place.write_bytes(b"mine")
    before = content(dog.parent)
    with pytest.raises(OutputError, match=rf"{place.name} exists already: .*--overwrite"):
        rite.convert(dog, "kohya")
    assert content(dog.parent) == before
    export = rite.convert(dog, "kohya", overwrite=True)
    assert place in (export.path, *export.embeddings) and place.read_bytes() != b"mine"


def test_out_replaces_its_file_but_never_an_input(dog):
    named = dog.with_name("named.safetensors")
    named.write_bytes(b"old")
    assert len(load_adapter(rite.convert(dog, "kohya", named).path).pairs) == 8
    link, hard = dog.with_name("link.safetensors"), dog.with_name("hard.safetensors")
    link.symlink_to(dog)
    hard.hardlink_to(dog)
    before = content(dog.parent)
    for out in (dog, link, hard):
        with pytest.raises(OutputError, match="is what is read"):
            rite.convert(dog, "kohya", out, overwrite=True)
        with pytest.raises(OutputError, match="is what is read"):
            rite.sketch(dog, out=out, prompts=["x"])
        with pytest.raises(OutputError, match="is what is read"):
            rite.fuse([dog], method="concat", out=out)
    assert content(dog.parent) == before


def test_a_non_empty_peft_folder_is_not_replaced(dog):
    (dog.parent / "old/unet").mkdir(parents=True)
    (dog.parent / "old/unet/adapter_model.safetensors").write_bytes(b"mine")
    (dog.parent / "empty").mkdir()
    with pytest.raises(OutputError, match="old is a folder"):
        rite.convert(dog, "peft", dog.parent / "old", overwrite=True)
    assert len(load_adapter(rite.convert(dog, "peft", dog.parent / "empty").path).pairs) == 8
    inside = dog.parent / "empty/unet/adapter_model.safetensors"
    with pytest.raises(OutputError, match="is what is read"):
        rite.convert(dog.parent / "empty", "kohya", inside)


def test_a_failed_export_leaves_no_folders(dog):
    before = content(dog.parent)
    tokens = {"<dog>": torch.full((1, 2, 8), 1e6)}
    save_adapter(dog, replace(mixed_adapter(), tokens=tokens))
    before = content(dog.parent)
    with pytest.raises(rite.RiteError, match="too large for fp16"):
        rite.convert(dog, "kohya", dog.parent / "new/folder/a.safetensors", dtype="fp16")
    assert content(dog.parent) == before


def test_fuse_sketch_and_card_replace_only_named_files(dog, monkeypatch):
    monkeypatch.chdir(dog.parent)
    for name in ("fused.safetensors", "f.report.json", "dog.sketch.safetensors", "README.md"):
        Path(name).write_bytes(b"mine")
    before = content(dog.parent)
    calls = {
        "fused.safetensors": lambda: rite.fuse([dog], method="concat"),
        "f.report.json": lambda: merging_report(dog),
        "dog.sketch.safetensors": lambda: rite.sketch(dog, prompts=["x"]),
        "README.md": lambda: write_card(dog),
    }
    for name, call in calls.items():
        with pytest.raises(OutputError, match=f"{name} exists already"):
            call()
    assert content(dog.parent) == before
    rite.fuse([dog], method="concat", overwrite=True)
    assert len(load_adapter(Path("fused.safetensors")).pairs) == 8
    write_card(dog, overwrite=True)
    assert Path("README.md").read_text().startswith("---")


def merging_report(dog):
    from rite_diffusion.api.fuse import fuse_and_report

    return fuse_and_report([dog], method="concat", out="f.safetensors")


def test_two_outputs_with_one_path_are_refused(tmp_path):
    for one, other in (("a.png", "a.png"), ("a.png", "A.png"), ("a.png", "x/../a.png")):
        (tmp_path / "x").mkdir(exist_ok=True)
        with pytest.raises(OutputError, match="would be one file"):
            check_outputs([tmp_path / one], [tmp_path / other])
    check_outputs([tmp_path / "a.png"], [tmp_path / "b.png"])
    assert content(tmp_path) == {"x": None}


def test_pictures_that_are_written_at_once_get_a_number_each(tmp_path):
    (tmp_path / "²³.png").write_bytes(b"mine")  # digits, but no number
    contents = [bytes([index]) for index in range(40)]
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda each: write_next(tmp_path, each), contents))
    assert sorted(path.name for path in paths) == [f"{index:05d}.png" for index in range(40)]
    assert [path.read_bytes() for path in paths] == contents


SUFFIXES = [
    ["generate", "x", "--out", "new.jpg"],
    ["generate", "x", "--out", "new.safetensors"],
    ["grid", "--prompt", "x", "--out", "new.jpg"],
    ["grid", "--prompt", "x", "--out", "new"],
    ["fuse", "dog.safetensors", "--out", "new.pt"],
    ["sketch", "dog.safetensors", "--out", "new.json"],
    ["convert", "dog.safetensors", "--to", "kohya", "--out", "new.ckpt"],
    ["convert", "dog.safetensors", "--to", "peft", "--out", "new.safetensors"],
    ["train", "photos", "--trigger", "<x>", "--class", "toy", "--out", "new.safetensors"],
    ["demo", "--out", "new.png"],
    ["studio", "--workspace", "new.toml"],
]


@pytest.mark.parametrize("line", SUFFIXES, ids=lambda line: f"{line[0]} {line[-1]}")
def test_an_output_whose_name_does_not_fit_is_refused(command, dog, line):
    before = content(dog.parent)
    done = command(*line)
    assert done.returncode == 2 and not done.stdout.strip()
    assert done.stderr.count("\n") == 1 and line[-1] in done.stderr and line[-2] in done.stderr
    assert content(dog.parent) == before


def test_a_folder_may_have_dots_in_its_name(tmp_path):
    for name in ("run-0.5", "outputs.v2", "dog.safetensors.d"):
        assert folder_output(tmp_path / name) == tmp_path / name
    (tmp_path / "odd.jpg").mkdir()
    assert folder_output(tmp_path / "odd.jpg") == tmp_path / "odd.jpg"


@pytest.mark.parametrize("text", ["a\0b", "x" * 300, "~nobody-here/x"])
def test_invalid_paths_are_refused(text):
    with pytest.raises(PathError, match="is not a path"):
        user_path(text)


def test_a_name_as_long_as_names_can_be_is_written(tmp_path, dog):
    out = tmp_path / ("x" * (255 - len(".safetensors")) + ".safetensors")
    save_adapter(out, mixed_adapter())
    assert len(load_adapter(out).pairs) == 8


def test_training_into_a_folder_of_other_files_is_refused(tmp_path):
    (tmp_path / "config.toml").write_text("mine")
    with pytest.raises(RunError, match=r"config.toml that is not a run's"):
        RunFolder(tmp_path).__enter__()
    assert content(tmp_path) == {"config.toml": b"mine"}


def test_drafts_are_saved_under_names_free_for_all_their_files(tmp_path, dog):
    space = Workspace(tmp_path / "space")
    drawn = tmp_path / "drawn.png"
    Image.new("RGB", (4, 4)).save(drawn)
    shutil.copy(dog, space.folder("drafts") / "fused.safetensors")
    (space.folder("adapters") / "mine.png").write_bytes(b"mine")
    assert fusing.save_draft(space, "fused.safetensors", "mine", drawn) == "mine-2"
    assert (
        library.import_adapter(space, shutil.copy(dog, tmp_path / "mine.safetensors")) == "mine-3"
    )
    with pytest.raises(StudioError, match="another 'mine'"):
        library.rename(space, "mine-2", "mine")
    library.delete(space, "mine-2")
    (space.folder("adapters") / "mine-2.png").write_bytes(b"newer")
    before = content(space.root)
    with pytest.raises(StudioError, match=r"'mine-2.png' exists again"):
        space.restore_from_trash()
    assert content(space.root) == before


def test_control_codes_of_files_do_not_reach_the_terminal(command, dog, tmp_path):
    evil = "\x1b]0;owned\x07\x1b[2J\u202enoise\nsecond line"
    info = replace(mixed_adapter().info, trigger=evil, class_noun=evil, config=evil, base=evil)
    path = tmp_path / "evil\x1b[31m.safetensors"
    save_adapter(path, replace(mixed_adapter(), info=info))
    for line in (["inspect", path], ["convert", path, "--to", "kohya"], ["card", path]):
        done = command(*line)
        assert done.returncode == 0, done.stderr
        assert "\\x1b" in done.stdout or line[0] == "card"
        assert not {c for c in done.stdout.replace("\n", "") if not c.isprintable()}
    assert not {c for c in (tmp_path / "README.md").read_text() if ord(c) < 32} - {"\n"}
    missing = command("inspect", f"{path}\x1b[2J")
    assert missing.returncode == 2 and missing.stderr.count("\n") == 1
    assert "\x1b" not in missing.stderr
    assert printable("a\udcffb") == "a\\udcffb" and printable("naïve 日本") == "naïve 日本"
    assert os.sep in str(path)
