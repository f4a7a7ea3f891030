"""The notebooks of examples/ run from top to bottom on the pocket base, with few steps."""

import ast
import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

import rite_diffusion as rite

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOKS = sorted((EXAMPLES / "notebooks").glob("*.ipynb"))
# In place of the parameters. Statistics for `gram` take a minute: a slow test has them.
QUICK = {"steps": 2, "drawing_steps": 2, "prior": {"weight": 0}, "method": "concat"}


def code_cells(notebook):
    return [cell for cell in json.loads(notebook.read_text())["cells"] if "outputs" in cell]


def run_cells(cells, quick):
    """Execute code cells with `quick` in place of the parameters.

    Returns their names, and the value of each cell's last expression.
    """
    names, shown = {"__name__": "__main__"}, []
    for cell in cells:
        tree = ast.parse("".join(cell["source"]))
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, "<notebook>", "exec"), names)
        if last is not None:
            shown.append(eval(compile(ast.Expression(last.value), "<notebook>", "eval"), names))
        if "parameters" in cell["metadata"].get("tags", []):
            assert {"steps", "drawing_steps", "prior"} <= names.keys()
            names |= {name: value for name, value in quick.items() if name in names}
    return names, shown


@pytest.fixture
def beside_photos(tmp_path, monkeypatch):
    """The working folder of a notebook: the example photos lie where it looks for them."""
    shutil.copytree(EXAMPLES / "photos", tmp_path / "photos")
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    return tmp_path / "notebooks"


def test_there_is_a_notebook_for_each_task():
    assert [path.stem for path in NOTEBOOKS] == ["fuse", "generate", "train"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_stored_without_outputs(notebook):
    assert all(c["outputs"] == [] and c["execution_count"] is None for c in code_cells(notebook))


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run_and_show_pictures(notebook, beside_photos):
    names, shown = run_cells(code_cells(notebook), QUICK)
    pictures = [value for value in shown if isinstance(value, Image.Image)]
    assert pictures and all(len(picture.getcolors(1 << 20)) > 50 for picture in pictures)
    concepts = {"train": "<robot>", "generate": "<robot>", "fuse": "<robot>, <unicorn>"}
    adapter = names["both" if notebook.stem == "fuse" else "adapter"]
    assert rite.inspect(adapter).info.trigger == concepts[notebook.stem]


@pytest.mark.slow
def test_the_notebook_of_fusing_runs_with_its_own_method(beside_photos):
    notebook = EXAMPLES / "notebooks/fuse.ipynb"
    names, _ = run_cells(code_cells(notebook), {k: v for k, v in QUICK.items() if k != "method"})
    assert rite.inspect(names["both"]).info.method == "fused: gram"
