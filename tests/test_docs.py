"""Documentation that is made from the code, and what its pages quote of it."""

import ast
import re
import sys
from pathlib import Path

import pytest

pytest.importorskip("sphinx")

import typer

import rite_diffusion
from rite_diffusion import optim
from rite_diffusion.cli.app import app
from rite_diffusion.config import known_keys, preset_names

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))

from make_reference import pages  # noqa: E402


@pytest.fixture(scope="module")
def reference():
    return pages()


def test_python_pages_describe_every_public_name(reference):
    for page, module in (("python.md", rite_diffusion), ("optim.md", optim)):
        found = re.findall(rf"\}} {re.escape(module.__name__)}\.(\w+)", reference[page])
        assert sorted(found) == sorted(module.__all__)


def test_the_commands_page_has_every_command_and_option(reference):
    group = typer.main.get_command(app)
    for name, command in group.commands.items():
        [section] = re.findall(rf"(?ms)^## rite {name}$(.*?)(?=^## |\Z)", reference["commands.md"])
        for parameter in command.params:
            assert f"`{parameter.opts[0]}" in section


def test_the_settings_page_has_every_setting(reference):
    text = reference["settings.md"]
    missing = [key for key in known_keys() if f"`{key}`" not in text and f"[{key}" not in text]
    assert missing == []
    assert (
        "| `lora.rank` | rank of every pair | whole number, at least 1, at most 1,024 | `8` |"
        in text
    )


def test_the_presets_page_has_every_preset(reference):
    assert all(f"## {name}\n" in reference["presets.md"] for name in preset_names())


def template(node):
    """A string expression as the troubleshooting page quotes it: `…` for what is filled in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(template(part) for part in node.values)
    return "…"


def test_every_message_of_the_troubleshooting_page_is_in_the_source():
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = [found[1].strip() for found in re.findall(r"(?m)^\*\*(`+)(.*?)\1\*\*$", text)]
    templates = {
        template(node)
        for path in (ROOT / "rite_diffusion").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant | ast.JoinedStr)
    }
    assert len(quoted) > 40
    assert [message for message in quoted if not any(message in each for each in templates)] == []
