import json

import numpy as np
import pytest
from PIL import Image

import rite_diffusion as rite
from rite_diffusion.adapters import load_adapter
from rite_diffusion.adapters.attach import attach
from rite_diffusion.api.sheet import AXES, plan_sheet
from rite_diffusion.errors import AdapterError, ConfigError, FusionError, OutputError
from rite_diffusion.generation.denoise import sample
from shared_bases import shared_base

ONE = {"prompt": ["a cat"], "adapter": [""], "weight": [1.0], "method": ["attached"], "seed": [0]}


def test_rows_run_through_all_axes_but_the_columns():
    values = ONE | {"prompt": ["a", "b"], "weight": [0.5, 1.0], "seed": [1, 2, 3]}
    sheet = plan_sheet(values, "seed")
    assert sheet.row_labels() == [
        "a, weight 0.5",
        "a, weight 1.0",
        "b, weight 0.5",
        "b, weight 1.0",
    ]
    assert sheet.column_labels() == ["seed 1", "seed 2", "seed 3"]
    assert len(sheet.setups()) == 2
    turned = plan_sheet(values, "prompt")
    assert turned.column_labels() == ["a", "b"] and len(turned.rows) == 6
    assert plan_sheet(ONE, "weight").row_labels() == ["a cat"]


@pytest.mark.parametrize(
    ("adapter", "label"),
    [("", "base alone"), ("x/dog.safetensors:0.5+cat.safetensors", "dog:0.5 + cat"),
     (["a+b/adapter.safetensors", "c.safetensors:2"], "a+b + c:2")],
)  # fmt: skip
def test_an_adapters_label_is_its_files_names_or_its_runs(adapter, label):
    assert plan_sheet(ONE | {"adapter": [adapter]}, "adapter").column_labels() == [label]


def test_every_cell_of_a_sheet_equals_the_picture_of_its_parameters(
    adapters, tiny_folder, tmp_path
):
    out = tmp_path / "sheet.png"
    both = f"{adapters[0]}:0.5+{adapters[1]}"
    image = rite.grid(
        ["a <0>", "a <1>"], adapters=["", both], weights=[0.5], methods=["attached", "weighted"],
        seeds=[4, 5], base=str(tiny_folder), steps=2, guidance=3, cell=64, out=out,
    )  # fmt: skip
    content = json.loads(Image.open(out).text["rite_grid"])
    assert content["columns"] == "seed" and content["rows"] == ["prompt", "adapter", "method"]
    assert (len(content["pictures"]), len(content["pictures"][0])) == (8, 2)
    facts = content["pictures"][6][1]  # the second prompt, both adapters, attached
    assert (facts["prompt"], facts["seed"], facts["method"]) == ("a <1>", 5, "attached")
    assert [each["weight"] for each in facts["adapters"]] == [0.25, 0.5]
    backbone = shared_base(str(tiny_folder))
    attach(backbone, load_adapter(adapters[0]), "a", 0.25)
    attach(backbone, load_adapter(adapters[1]), "b", 0.5)
    [alone] = sample(backbone, ["a <1>"], [5], steps=2, guidance=3)
    left, top = 200 + 72, image.height - 2 * 72
    cut = np.asarray(image.crop((left, top, left + 64, top + 64)), int)
    assert np.abs(cut - np.asarray(alone, int)).max() <= 2
    fused = np.asarray(image.crop((left, top + 72, left + 64, top + 136)), int)
    assert np.abs(fused - cut).max() <= 3  # `weighted` is the same sum
    assert AXES[0] in facts


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [({"columns": "colour"}, ConfigError, "no axis 'colour'"),
     ({"seeds": []}, ConfigError, "no seed"),
     ({"methods": ["grim"]}, FusionError, "no method 'grim'"),
     ({"adapters": ["nowhere.safetensors"]}, AdapterError, "no adapter file"),
     ({"out": "sheet.jpg"}, OutputError, "is not a .png"),
     ({"seeds": range(3000)}, ConfigError, "more than 2500")],
)  # fmt: skip
def test_invalid_sheets_are_refused(change, error, words):
    with pytest.raises(error, match=words):
        rite.grid(["a cat"], **change)
