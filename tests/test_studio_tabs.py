"""What the tabs work out before a recipe is called, and how a recipe is followed."""

import itertools
import math
import os
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from random_adapters import small_adapter
from rite_diffusion.adapters.dialects import DIALECTS
from rite_diffusion.errors import ConfigError, StudioError
from rite_diffusion.fusion import FUSIONS
from rite_diffusion.fusion.report import ConflictReport, LayerConflict
from rite_diffusion.studio.background import run_with_progress
from rite_diffusion.studio.boxes import (
    BY_WORDS,
    NONE,
    Box,
    boxes_of,
    canvas_html,
    read_corners,
    region_texts,
    side_by_side,
)
from rite_diffusion.studio.conflicts import report_html, verdict
from rite_diffusion.studio.exports import PROGRAMS
from rite_diffusion.studio.fusing import new_draft, prompts_to_compare, save_draft
from rite_diffusion.studio.library import Card, cards
from rite_diffusion.studio.tabs.adapters import MAX_ADAPTERS, chosen_with_weights, offered, sliders
from rite_diffusion.studio.tabs.compare import APART, BASE_ALONE, TOGETHER, groups_of, numbers_in
from rite_diffusion.studio.tabs.fields import decimal, whole_number
from rite_diffusion.studio.tabs.fuse import METHODS
from rite_diffusion.studio.tabs.train import _chosen
from rite_diffusion.studio.workspace import Workspace


def test_run_with_progress_yields_reports_then_the_result():
    def work(progress):
        progress(1, 2)
        progress(2, 2)
        return "sheet"

    assert list(run_with_progress(work)) == [
        ("progress", (1, 2)),
        ("progress", (2, 2)),
        ("result", "sheet"),
    ]


def test_closing_run_with_progress_ends_the_work():
    ended = threading.Event()

    def work(progress):
        try:
            for count in itertools.count():
                progress(count)
                time.sleep(0.001)
        finally:
            ended.set()

    items = run_with_progress(work)
    assert next(items) == ("progress", (0,))
    items.close()
    assert ended.wait(10)


def test_run_with_progress_raises_errors_of_the_work():
    def work(progress):
        raise ConfigError("no axis 'x'")

    with pytest.raises(ConfigError, match="no axis 'x'"):
        list(run_with_progress(work))


def test_an_adapter_that_stays_chosen_keeps_its_weight():
    names, *fresh = sliders(["a", "b"], ["b", "c"], 0.3, 0.7, *[1.0] * (MAX_ADAPTERS - 2))
    assert names == ["b", "c"] and len(fresh) == MAX_ADAPTERS
    assert [(each.visible, each.value) for each in fresh[:3]] == [
        (True, 0.7), (True, 1.0), (False, 1.0),
    ]  # fmt: skip
    assert chosen_with_weights(["b", "c"], [0.7, 1.0, 0.2]) == [("b", 0.7), ("c", 1.0)]


def test_boxes_survive_conversion_to_regions():
    boxes = [
        Box(0, 0, 0.5, 1, "a <cat>", adapter="cat"),
        Box(0.5, 0, 1, 1, "a  dog\n", "red", NONE),
        Box(0, 0, 1, 0.2, "the sky"),
    ]
    texts = region_texts(boxes, ["cat", "dog"])
    assert texts == (
        "0,0,0.5,1: a <cat> ::  :: 1,0", "0.5,0,1,1: a dog :: red :: 0,0", "0,0,1,0.2: the sky",
    )  # fmt: skip
    back = boxes_of(texts, ["cat", "dog"])
    assert back == [boxes[0], replace(boxes[1], prompt="a dog"), boxes[2]]
    assert region_texts([], ["cat"]) == ()
    assert boxes_of(["0,0,1,1: x ::  :: 0.2,-0.9"], ["cat", "dog"])[0].adapter == "dog"
    assert boxes_of(["0,0,1,1: x ::  :: 1"], [""])[0].adapter == BY_WORDS  # it is gone
    assert boxes_of(["0,0,1,1: x ::  :: 1,1"], [])[0].adapter == BY_WORDS
    assert canvas_html([Box(0, 0, 1, 1)] * 20, 19).count("data-index") == 20


@pytest.mark.parametrize(
    ("box", "words"),
    [(Box(0, 0, 1, 1, " "), "box 1 has no prompt"), (Box(0, 0, 1, 1, "a :: b"), "leave it out"),
     (Box(0, 0, 1, 1, "a", adapter="gone"), "not among the adapters")],
)  # fmt: skip
def test_incomplete_boxes_are_refused(box, words):
    with pytest.raises(StudioError, match=words):
        region_texts([box], ["cat"])


def test_corners_are_clipped_and_checked():
    assert read_corners("-1, 0.1, 0.5, 3") == {"left": 0, "top": 0.1, "right": 0.5, "bottom": 1}
    for text in ("0, 0, 1", "0,0,x,1", "nan,0,1,1", "0.5,0,0.5,1"):
        with pytest.raises(StudioError):
            read_corners(text)


def test_side_by_side_keeps_prompts_of_boxes():
    columns = side_by_side([Box(0.1, 0.1, 0.2, 0.2, "a cat")])
    assert [box.corners for box in columns] == [(0, 0, 0.5, 1), (0.5, 0, 1, 1)]
    assert [box.prompt for box in columns] == ["a cat", ""]
    assert [box.left for box in side_by_side([Box(0, 0, 1, 1)] * 3)] == [0, 0.333, 0.667]


def test_markup_in_boxes_is_escaped():
    html = canvas_html([Box(0, 0, 1, 1, "a <cat>", adapter="<b>")], 0)
    assert "a &lt;cat&gt;" in html and "&lt;b&gt;" in html and html.count('class="box picked"') == 1


def test_every_method_and_dialect_has_a_description():
    assert set(METHODS) == set(FUSIONS) and set(PROGRAMS) == set(DIALECTS)


def test_adapters_of_a_sheet_are_grouped_or_separate():
    assert groups_of([BASE_ALONE, "one", "two"], APART) == [[], ["one"], ["two"]]
    assert groups_of([BASE_ALONE, "one", "two"], TOGETHER) == [[], ["one", "two"]]
    assert groups_of(["one"], TOGETHER) == [["one"]] and groups_of([], APART) == [[]]


def test_number_lists_are_parsed():
    assert numbers_in("0.5; 1,", "weights", float) == [0.5, 1.0]
    with pytest.raises(StudioError, match="numbers with commas"):
        numbers_in("0, x", "seeds", int)


def test_empty_number_fields_give_none():
    assert whole_number(" ", "steps") is None and whole_number(" 20 ", "steps") == 20
    assert decimal("", "guidance") is None and decimal("2.5", "guidance") == 2.5
    for read, text in ((whole_number, "2.5"), (decimal, "x"), (decimal, "nan"), (decimal, "inf")):
        with pytest.raises(StudioError, match=f"not '{text}'"):
            read(text, "guidance")


def test_empty_fields_do_not_reach_the_settings():
    empty = dict.fromkeys(("steps", "batch", "rank", "optimizer", "rate", "every", "prompts"), "")
    assert _chosen(empty | {"seed": 0}) == {"seed": 0}
    filled = empty | {"seed": 1, "rank": "4", "rate": "1e-3", "every": "0", "prompts": "a\n\nb"}
    assert _chosen(filled) == {
        "seed": 1, "lora": {"rank": 4}, "optim": {"lr": 0.001},
        "previews": {"every": 0, "prompts": ["a", "b"]},
    }  # fmt: skip
    assert _chosen(empty | {"seed": 0, "rate": "auto"})["optim"] == {"lr": "auto"}


def a_card(name: str, trigger: str) -> Card:
    return Card(name, Path(name), "", trigger, "", "", "", "", 0, None)


def test_comparison_prompts_contain_every_concept():
    a, b, c = (a_card(word, f"<{word}>") for word in "abc")
    both, *alone = prompts_to_compare([a, b])
    assert both == "a <a> on the left and a <b> on the right on a blue background"
    assert alone == ["a <a> on a blue background", "a <b> on a blue background"]
    assert prompts_to_compare([a, b, c])[0] == "a <a> and a <b> and a <c> on a blue background"
    assert prompts_to_compare([a_card("x", "")]) == ["a blue background"]


def a_report(before: list[float], after: list[float]) -> ConflictReport:
    layer = LayerConflict("lora_unet_<mid>", [[1, 0.4], [math.nan, 1]], before, after, 1.0, 0.3)
    return ConflictReport("gram", ["<a>", "<b>"], layer.crosstalk, before, after, 1.0, 0.3, [layer])


def test_the_conflict_report_gives_a_verdict_and_escapes_names():
    html = report_html(a_report([0.9, 0.4], [0.1, math.nan]))
    assert "fit together by gram; side by side, without fusion, they would not" in html
    assert "&lt;a&gt;" in html and "<a>" not in html and "lora_unet_&lt;mid&gt;" in html
    assert "nan" not in html and "–" in html
    assert "Some of <b> is lost" in verdict(a_report([0.9, 0.9], [0.1, 0.6]))
    assert "Most of <a> is lost" in verdict(a_report([0.9, 0.9], [1.2, 0.6]))
    assert "also would side by side" in verdict(a_report([0.1, 0.2], [0.1, 0.2]))


def test_saving_a_draft_keeps_its_picture_and_deletes_old_drafts(tmp_path):
    space = Workspace(tmp_path)
    draft = small_adapter(new_draft(space))
    picture = tmp_path / "p.png"
    picture.write_bytes(b"picture")
    assert save_draft(space, draft.name, " both ", picture) == "both"
    [card] = cards(space)
    assert card.preview.read_bytes() == b"picture"
    with pytest.raises(StudioError, match="nothing to save"):
        save_draft(space, "", "x", None)
    with pytest.raises(StudioError):
        save_draft(space, "../adapters/both.safetensors", "x", None)
    old = small_adapter(new_draft(space))
    os.utime(old, (0, 0))
    assert new_draft(space) == old and not old.exists()


def test_refreshing_a_list_keeps_a_newer_choice():
    assert "value" not in offered(["a", "b"], ["a"])  # the page may have another by now
    assert offered(["a", "b"], ["a", "gone"])["value"] == ["a"]
