"""What a command knows it says before what takes time, and nothing where it fails at once."""

import time

import pytest
from PIL import Image
from typer.testing import CliRunner

from rite_diffusion.cli import output
from rite_diffusion.cli.app import app
from rite_diffusion.errors import BackboneError, RunError
from rite_diffusion.training import plan as planning


def refuse(error):
    def refused(*_, **__):
        raise error

    return refused


def test_photos_are_reported_before_the_base_is_opened(photos, monkeypatch):
    Image.new("RGB", (80, 70), "white").save(photos / "3.webp")
    (photos / "4.png").write_bytes(b"no picture")
    monkeypatch.setattr(planning, "open_backbone", refuse(BackboneError("it is gone")))
    line = ["train", str(photos), "--trigger", "<thing>", "--class", "toy", "--dry-run"]
    result = CliRunner().invoke(app, line)
    told = result.stdout.splitlines()
    assert told[0].startswith("photos      4 in ") and told[1].split()[1] == "2"
    assert any(each.startswith("skipped     4.png") for each in told)
    assert any(each.startswith("class ") for each in told)
    assert isinstance(result.exception, BackboneError)


def test_the_demo_reports_before_it_draws_the_class(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        planning, "class_pictures", lambda *a: drawn.append(1) or refuse(RunError("drawing"))()
    )
    result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path / "demo")])
    assert drawn == [1] and str(result.exception) == "drawing"
    assert "photos      6 in " in result.stdout and "training    150 steps" in result.stdout


@pytest.mark.parametrize(
    "line",
    [["grid", "--prompt", "a cat", "--adapter", "nowhere.safetensors"],
     ["fuse", "nowhere.safetensors"], ["sketch", "nowhere.safetensors"]],
    ids=lambda line: line[0],
)  # fmt: skip
def test_a_command_that_fails_without_a_terminal_prints_no_empty_line(line):
    result = CliRunner().invoke(app, line)
    assert result.exit_code and result.stdout == ""


def test_pictures_are_counted_in_lines_where_there_is_no_terminal(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with output.picture_progress("statistics") as progress:
        for done in range(1, 8):
            now[0] += 12
            progress(done, 7)
    assert capsys.readouterr().out.splitlines() == ["statistics  3 of 7", "statistics  6 of 7"]
