"""Embeddings from other tools' files and pickles: words that convert, describe and draw."""

import pytest
import torch
from diffusers.loaders.textual_inversion import load_textual_inversion_state_dicts
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

import rite_diffusion as rite
from rite_diffusion.adapters import load_adapter
from rite_diffusion.adapters.dialects.published import load_published
from rite_diffusion.cli.app import app
from rite_diffusion.errors import AdapterError, OutputError

ROWS = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
WIDE = torch.randn(2, 32, generator=torch.Generator().manual_seed(1))
PICKLES = {
    "a1111": {"string_to_param": {"*": ROWS}, "string_to_token": {"*": 265}, "name": "dog",
              "step": 9, "sd_checkpoint": None},
    "a1111 parameter": {"string_to_param": {"*": nn.Parameter(ROWS)}, "name": "dog"},
    "textual inversion": {"string_to_param": nn.ParameterDict({"*": nn.Parameter(ROWS)}),
                          "string_to_token": {"*": torch.tensor(265)}},
    "diffusers": {"<dog>": ROWS},
    "diffusers vector": {"dog": ROWS[0]},
    "diffusers half": {"dog": ROWS.half()},
    "sdxl": {"clip_l": ROWS, "clip_g": WIDE},
    "emb_params": {"emb_params": ROWS},
}  # fmt: skip


@pytest.mark.parametrize("layout", PICKLES)
def test_embeddings_in_pickles_convert(tmp_path, layout):
    torch.save(PICKLES[layout], tmp_path / "dog.pt")
    adapter = load_published(tmp_path / "dog.pt", None)
    assert adapter.pairs == [] and {word.strip("<>@2") for word in adapter.tokens} == {"dog"}
    export = rite.convert(tmp_path / "dog.pt", "kohya", published_pickle=True)
    assert export.path == tmp_path / "dog.safetensors"
    written = load_file(export.path)
    wanted = ROWS[:1] if "vector" in layout else ROWS.half() if "half" in layout else ROWS
    first = written["clip_l" if layout == "sdxl" else "emb_params"]
    assert torch.equal(first, wanted.float())
    assert layout != "sdxl" or torch.equal(written["clip_g"], WIDE)
    again = load_adapter(export.path)
    assert all(torch.equal(again.tokens["dog" + key[len("<dog>"):] if "<" in key else key], value)
               for key, value in adapter.tokens.items())  # fmt: skip


def test_a_converted_embedding_is_inspected_and_changes_the_picture(tmp_path, tiny_folder):
    torch.save(PICKLES["a1111"], tmp_path / "dog.pt")
    command = ["convert", str(tmp_path / "dog.pt"), "--to", "kohya", "--published-pickle"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0 and "dog.safetensors" in result.output, result.output
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "dog.safetensors")])
    assert shown.exit_code == 0 and "dog (1 layers of 2 x 64)" in shown.output, shown.output
    one = {"steps": 1, "width": 64, "height": 64, "base": str(tiny_folder)}
    [plain] = rite.generate("a dog", **one)
    [drawn] = rite.generate("a dog", adapters=[tmp_path / "dog.safetensors"], **one)
    assert plain.tobytes() != drawn.tobytes()


def test_diffusers_loads_a_converted_embedding(tmp_path):
    torch.save(PICKLES["a1111"], tmp_path / "dog.pt")
    path = rite.convert(tmp_path / "dog.pt", "diffusers", published_pickle=True).path
    [state] = load_textual_inversion_state_dicts([str(path)])
    assert torch.equal(next(iter(state.values())), ROWS)


def test_embedding_files_convert_without_replacing_files(tmp_path):
    save_file({"sks": ROWS[0].clone()}, tmp_path / "thing.safetensors")
    assert load_adapter(tmp_path / "thing.safetensors").tokens.keys() == {"sks"}
    export = rite.convert(tmp_path / "thing.safetensors", "kohya")
    assert export.path.name == "sks.safetensors"
    before = export.path.read_bytes()
    with pytest.raises(OutputError, match="exists already"):
        rite.convert(tmp_path / "thing.safetensors", "kohya")
    with pytest.raises(OutputError, match="is what is read"):
        rite.convert(export.path, "kohya")  # it would be its own export
    assert export.path.read_bytes() == before
    other = rite.convert(export.path, "kohya", tmp_path / "other.safetensors").path
    assert torch.equal(load_file(other)["emb_params"], ROWS[:1])


BROKEN = {
    "2 embeddings": {"string_to_param": {"*": ROWS, "+": ROWS}},
    "are not tensors": {"string_to_param": {"*": "x"}},
    "where weights by name should be": {"string_to_param": [ROWS]},
    "NaN or infinity": {"<dog>": ROWS * torch.inf},
    "no known layout": {"dog": ROWS, "cat": ROWS},
}


@pytest.mark.parametrize("words", BROKEN)
def test_other_pickles_are_refused(tmp_path, words):
    torch.save(BROKEN[words], tmp_path / "dog.pt")
    with pytest.raises(AdapterError, match=words):
        load_published(tmp_path / "dog.pt", None)


def test_refusing_a_pickle_names_the_option_that_converts_it(tmp_path):
    torch.save(PICKLES["a1111"], tmp_path / "dog.pt")
    with pytest.raises(AdapterError, match="--published-pickle"):
        load_adapter(tmp_path / "dog.pt")
