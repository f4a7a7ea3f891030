"""What the tabs work out before a recipe is called, and how a recipe is followed."""

import itertools
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import rite_diffusion as rite
from rite_diffusion.adapters import load_adapter
from rite_diffusion.generation.metadata import read_parameters
from rite_diffusion.types import ConfigError, StudioError
from rite_diffusion.ui import library
from rite_diffusion.ui.background import followed
from rite_diffusion.ui.engine import Engine, Wish
from rite_diffusion.ui.library import Card
from rite_diffusion.ui.tabs.adapters import MOST, chosen_with_weights, sliders
from rite_diffusion.ui.tabs.compare import BASE_ALONE, _axes, _drawing
from rite_diffusion.ui.tabs.fuse import _fusing, draft, together
from rite_diffusion.ui.tabs.regions import boxes_html, region_texts
from rite_diffusion.ui.workspace import Workspace
from test_studio_files import an_adapter


def test_a_recipe_that_is_followed_tells_its_reports_then_its_result():
    def work(listen):
        listen(1, 2)
        listen(2, 2)
        return "sheet"

    assert list(followed(work)) == [("heard", (1, 2)), ("heard", (2, 2)), ("made", "sheet")]


def test_closing_ends_the_work_at_its_next_report():
    ended = threading.Event()

    def work(listen):
        try:
            for count in itertools.count():
                listen(count)
                time.sleep(0.001)
        finally:
            ended.set()

    items = followed(work)
    assert next(items) == ("heard", (0,))
    items.close()
    assert ended.wait(10)


def test_a_fault_of_the_work_is_raised_where_it_is_followed():
    def work(listen):
        raise ConfigError("no axis 'x'")

    with pytest.raises(ConfigError, match="no axis 'x'"):
        list(followed(work))


def test_an_adapter_that_stays_chosen_keeps_its_weight():
    names, *fresh = sliders(["a", "b"], ["b", "c"], 0.3, 0.7, *[1.0] * (MOST - 2))
    assert names == ["b", "c"] and len(fresh) == MOST
    assert [(each.visible, each.value) for each in fresh[:3]] == [
        (True, 0.7), (True, 1.0), (False, 1.0),
    ]  # fmt: skip
    assert chosen_with_weights(["b", "c"], [0.7, 1.0, 0.2]) == [("b", 0.7), ("c", 1.0)]


def test_boxes_become_regions_and_their_words_stay_text():
    rows = [[0, 0, 0.5, 1, "a <cat>", ""], [0.5, 0, 1, 1, "a dog", "red"], [None] * 6]
    assert region_texts(rows) == ["0,0,0.5,1: a <cat>", "0.5,0,1,1: a dog :: red"]
    svg = boxes_html(rows)
    assert svg.count("<rect") == 2 and "a &lt;cat&gt;" in svg
    for bad in ([], [[0, 0, 1, 1, "", ""]], [["x", 0, 1, 1, "a cat", ""]]):
        with pytest.raises(StudioError):
            region_texts(bad)


def test_axes_of_a_sheet(tmp_path):
    space = Workspace(tmp_path)
    for name in ("one", "two"):
        an_adapter(space.folder("adapters") / f"{name}.safetensors")
    files = [f"{space.root / 'adapters' / name}.safetensors:1" for name in ("one", "two")]
    given = ("a cat\n\na dog", [BASE_ALONE, "one", "two"], False, "0.5; 1", "0,1,2", [])
    assert _axes(space, *given) == {
        "prompts": ["a cat", "a dog"],
        "adapters": ["", *files],
        "weights": [0.5, 1.0],
        "methods": ["attached"],
        "seeds": [0, 1, 2],
    }
    together_now = _axes(space, "a cat", ["one", "two"], True, "1", "0", ["gram"])
    assert together_now["adapters"] == ["+".join(files)]
    with pytest.raises(StudioError, match="300 pictures"):
        _axes(space, "\n".join("a" * 300), ["one"], False, "1", "0", [])
    with pytest.raises(StudioError, match="numbers with commas"):
        _axes(space, "a cat", [], False, "1", "x", [])
    with pytest.raises(StudioError, match="write a prompt"):
        _axes(space, " ", [], False, "1", "0", [])


@pytest.fixture
def stocked(tmp_path, tiny_folder, adapters) -> Workspace:
    """A workspace with two adapters, and the base that they were made for among its models."""
    space = Workspace(tmp_path / "studio")
    shutil.copytree(tiny_folder, space.folder("models") / "tiny-sd")
    for name, path in zip("ab", adapters, strict=True):
        shutil.copy(path, space.folder("adapters") / f"{name}.safetensors")
    return space


def test_a_fusion_tells_of_its_pictures_and_leaves_a_draft(stocked):
    *heard, (kind, outcome) = _fusing(stocked, [("a", 0.5), ("b", 1.0)], "gram", {"rank": 3})
    assert kind == "made" and outcome.adapter == draft(stocked) and outcome.sheet.exists()
    assert [what for kind, what in heard] == [(count,) for count in range(1, len(heard) + 1)]
    assert load_adapter(draft(stocked)).ranks() == [3]


def test_a_sheet_tells_of_its_pictures_and_is_kept(stocked):
    axes = _axes(stocked, "a cat", ["a", "b"], True, "1", "0", ["attached", "switch"])
    base = library.base_of(stocked, ["a", "b"])
    *heard, (kind, sheet) = _drawing(stocked, axes, "method", 2, base)
    assert [what for _, what in heard] == [(1, 2), (2, 2)] and kind == "made"
    assert Path(sheet.info["path"]).parent == stocked.folder("sheets")


def test_regions_are_drawn_by_the_open_model_as_by_the_command(stocked, tiny_folder):
    regions = ("0,0,0.5,1: a <0>", "0.5,0,1,1: a <1>")
    files = library.with_weights(stocked, [("a", 1.0), ("b", 1.0)])
    *_, last = Engine().draw(stocked, [Wish("a park", steps=2, regions=regions)], files)
    [same] = rite.generate(
        "a park", adapters=files, regions=regions, steps=2, base=str(tiny_folder)
    )
    assert np.array_equal(np.asarray(last.image), np.asarray(same))
    assert read_parameters(last.path).regions == list(regions)


def test_a_prompt_that_calls_every_concept(tmp_path):
    cards = [
        Card(word, tmp_path, "", f"<{word}>", "", "", "", "", 0, None) for word in ("a", "b", "c")
    ]
    assert together(cards[:2]) == ("a <a> on the left and a <b> on the right on a blue background")
    assert together(cards) == "a <a> and a <b> and a <c> on a blue background"
