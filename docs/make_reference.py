"""The reference pages, made from the public surface: names, commands and settings.

`pages()` gives the Markdown of each; conf.py writes them into docs/reference/ before every build,
so what they say is what the code does. Only public names are imported here: moving modules about
within the package changes nothing.
"""

import ast
import inspect
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from sphinx.ext.napoleon import Config, GoogleDocstring

import rite_diffusion
import rite_diffusion.optim
from rite_diffusion.cli.app import app
from rite_diffusion.config import TrainConfig, preset_folder, preset_names
from rite_diffusion.fusion.settings import FusionSettings
from rite_diffusion.sweeps.definition import SweepSection

FENCE = "`" * 7  # longer than any fence within a docstring


def pages() -> dict[str, str]:
    """Every reference page's Markdown by its file name."""
    return {
        "python.md": python_page(
            "Python API",
            "`import rite_diffusion as rite`. Everything heavy is imported on first use.",
            rite_diffusion,
        ),
        "optim.md": python_page(
            "Python API: optimizers",
            "`rite_diffusion.optim` imports torch and nothing else of this toolkit. "
            "[Which to choose](../optimizers.md).",
            rite_diffusion.optim,
        ),
        "commands.md": commands_page(app),
        "settings.md": settings_page(TrainConfig),
        "fusion-settings.md": fusion_settings_page(FusionSettings),
        "sweep-settings.md": sweep_settings_page(SweepSection),
        "presets.md": presets_page(),
    }


def write_pages(folder: Path) -> None:
    """Write the pages into a folder; those that say the same already keep their time stamp."""
    folder.mkdir(exist_ok=True)
    for name, text in pages().items():
        path = folder / name
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


# --- Python ---------------------------------------------------------------------------------------


def python_page(title: str, lead: str, module: Any) -> str:
    """A page of everything that a module's `__all__` names."""
    entries = [_entry(module.__name__, name, getattr(module, name)) for name in module.__all__]
    return "\n".join([f"# {title}", "", lead, "", *entries])


def _entry(module: str, name: str, value: Any) -> str:
    """A public name's heading, and the directive that describes it."""
    where = f"{module}.{name}"
    if inspect.ismodule(value):
        body = _directive("module", where, _first_line(value))
    elif inspect.isclass(value):
        parts = [_docstring(value), _subclasses(value), *_methods(value)]
        body = _directive("class", f"{where}{_signature(value)}", *parts)
    elif callable(value):
        body = _directive("function", f"{where}{_signature(value)}", _docstring(value))
    else:
        body = _directive("data", where, _constant(value))
    return f"## {name.strip('_')}\n\n{body}"


def _directive(kind: str, signature: str, *parts: str) -> str:
    body = "\n\n".join(part for part in parts if part)
    fence = FENCE if kind in ("class", "function", "data", "module") else FENCE[:-1]
    return f"{fence}{{py:{kind}}} {signature}\n\n{body}\n{fence}\n"


def _subclasses(cls: type) -> str:
    """The kinds of an error, which its own module defines."""
    if not issubclass(cls, Exception):
        return ""
    kinds = [each for each in cls.__subclasses__() if each.__module__ == cls.__module__]
    return "\n".join(f"- `{each.__name__}`: {_first_line(each)}" for each in kinds)


def _methods(cls: type) -> Iterator[str]:
    """The directives of a class's public methods, without those that torch and others define."""
    own = [parent for parent in reversed(cls.__mro__) if parent.__module__.startswith("rite_")]
    foreign = {name for parent in cls.__mro__ if parent not in own for name in dir(parent)}
    members = {name: member for parent in own for name, member in vars(parent).items()}
    for name, member in members.items():
        if name.startswith("_") or name in foreign or not inspect.getdoc(member):
            continue
        if isinstance(member, property):
            yield _directive("property", name, _docstring(member))
        elif callable(member):
            yield _directive(
                "method", f"{name}{_signature(member, bound=True)}", _docstring(member)
            )


class _Source:
    """Something whose repr is a given text, as a signature shows annotations and defaults."""

    def __init__(self, text: str):
        self.text = text

    def __repr__(self) -> str:
        return self.text


def _signature(value: Any, bound: bool = False) -> str:
    """Parameters and result as one writes them: names without modules, functions as `...`."""
    try:
        signature = inspect.signature(value)
    except ValueError:  # an exception's, which is built in
        return ""
    parameters = list(signature.parameters.values())[1 if bound else 0 :]
    shown = [
        each.replace(default=_default(each.default), annotation=_annotation(each.annotation))
        for each in parameters
    ]
    result = _annotation(signature.return_annotation)
    if inspect.isclass(value):
        result = inspect.Signature.empty
    return str(signature.replace(parameters=shown, return_annotation=result))


def _annotation(value: Any) -> Any:
    """An annotation without the modules of its names."""
    if value is inspect.Parameter.empty:
        return value
    text = value if isinstance(value, str) else inspect.formatannotation(value)
    return _Source(re.sub(r"\b(?:\w+\.)+(\w+)", r"\1", text))


def _default(value: Any) -> Any:
    """A default as source text; `...` for what has none, such as a function."""
    if value is inspect.Parameter.empty:
        return value
    try:
        ast.parse(repr(value), mode="eval")
    except SyntaxError:
        return _Source("...")
    return value


def _docstring(value: Any) -> str:
    """A docstring in Markdown, its Google sections as field lists."""
    text = inspect.getdoc(value) or ""
    lines = GoogleDocstring(text, Config(napoleon_use_rtype=False), what="function").lines()
    return re.sub(r"(?m)^\.\. rubric:: (.*)$", r"**\1**", "\n".join(lines)).strip()


def _first_line(value: Any) -> str:
    return (inspect.getdoc(value) or "").partition("\n")[0]


def _constant(value: Any) -> str:
    if isinstance(value, Mapping):
        return "Keys: " + ", ".join(f"`{key}`" for key in value) + "."
    return f"A `{type(value).__name__}`."


# --- commands -------------------------------------------------------------------------------------


def commands_page(application: typer.Typer) -> str:
    """Every command with its arguments and options, as `--help` tells them."""
    group = typer.main.get_command(application)
    parts = ["# Commands", "", "`rite COMMAND --help` says the same in the terminal.", ""]
    for command, name in _commands(group, "rite"):
        context = typer.Context(command, info_name=name)
        parts += [f"## {name}", "", command.help or "", ""]
        parts += [f"```text\n{command.get_usage(context).removeprefix('Usage: ')}\n```", ""]
        rows = [_command_row(record) for record in _records(command, context)]
        parts += [*_table(("argument or option", "meaning"), rows), ""]
    return "\n".join(parts)


def _commands(command: Any, name: str) -> Iterator[tuple[Any, str]]:
    """A command and those below it, with their full names."""
    below = getattr(command, "commands", None)
    if below is None:
        yield command, name
        return
    for key, each in below.items():
        yield from _commands(each, f"{name} {key}")


def _records(command: Any, context: typer.Context) -> Iterator[tuple[str, str]]:
    for parameter in command.params:
        record = parameter.get_help_record(context)
        if record:
            yield record


def _command_row(record: tuple[str, str]) -> tuple[str, str]:
    names, meaning = record
    text, _, facts = meaning.partition("  [")
    return f"`{names}`", _escaped(text) + (f" *({_escaped(facts.rstrip(']'))})*" if facts else "")


# --- settings -------------------------------------------------------------------------------------


def settings_page(model: type[BaseModel]) -> str:
    """Every setting of a training run, its values, default and meaning."""
    lead = (
        "Settings of `rite train`: in a preset or another `.toml` file, as `--set key=value`, and "
        "as keyword arguments of `rite_diffusion.train`. An unknown key is an error. What a "
        "[preset](presets.md) sets goes before the default given here."
    )
    return "\n".join(["# Settings", "", lead, "", *_section(model, "")])


def fusion_settings_page(model: type[BaseModel]) -> str:
    """Every setting of a fusion, its values, default and meaning."""
    lead = (
        "Settings of `rite fuse`: as `--set key=value`, and as keyword arguments of "
        "`rite_diffusion.fuse`. [Which method does what](../fusion.md)."
    )
    return "\n".join(["# Settings of fusing", "", lead, "", *_section(model, "", "All methods")])


def sweep_settings_page(model: type[BaseModel]) -> str:
    """Every key of a sweep's own table."""
    lead = (
        "Keys of the table `[sweep]` in the file of `rite sweep`, beside the "
        "[settings](settings.md) that all its runs share. [What a sweep is](../sweeps.md)."
    )
    return "\n".join(["# Settings of sweeps", "", lead, "", *_section(model, "", "[sweep]")])


def _section(model: type[BaseModel], prefix: str, title: str = "At the top") -> list[str]:
    """The table of a model's own fields, then those of the models that it holds."""
    inner = {name: _model_in(info.annotation) for name, info in model.model_fields.items()}
    rows = [_setting_row(model, name, prefix) for name, held in inner.items() if held is None]
    parts = [f"## {title}", "", _first_line(model), ""]
    parts += [*_table(("setting", "meaning", "values", "default"), rows), ""]
    for name, held in inner.items():
        if held is not None:
            many = get_origin(model.model_fields[name].annotation) is list
            shown = f"[[{prefix}{name}]]" if many else f"[{prefix}{name}]"
            parts += _section(held, f"{prefix}{name}.", _escaped(shown))
    return parts


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model that an annotation is, or is a list of."""
    inner = (get_args(annotation) or (annotation,))[0]
    return inner if inspect.isclass(inner) and issubclass(inner, BaseModel) else None


def _setting_row(model: type[BaseModel], name: str, prefix: str) -> tuple[str, str, str, str]:
    info = model.model_fields[name]
    values = ", ".join([_values(info.annotation), *_bounds(info.metadata)])
    return f"`{prefix}{name}`", _escaped(_meaning(model, name)), values, _default_setting(info)


def _meaning(model: type[BaseModel], name: str) -> str:
    """A field's description, by the model itself or by the one that first declared it."""
    for each in model.__mro__:
        field = getattr(each, "model_fields", {}).get(name)
        if field is not None and field.description:
            return field.description
    return ""


def _default_setting(info: FieldInfo) -> str:
    """A default as TOML has it; empty where the setting is left open."""
    if info.default is PydanticUndefined:
        return "*(required)*"
    return "" if info.default is None else f"`{json.dumps(info.default)}`"


def _values(annotation: Any) -> str:
    """What a setting takes, in words: its type or choices, and inner bounds."""
    kind, inside = get_origin(annotation), get_args(annotation)
    if kind is Annotated:
        bounds = [bound for each in inside[1:] for bound in _bounds(getattr(each, "metadata", []))]
        return ", ".join([_values(inside[0]), *bounds])
    if kind in (Union, UnionType):
        return "; ".join(_values(each) for each in inside if each is not NoneType)
    if kind is Literal:
        return " or ".join(f"`{each}`" for each in inside)
    if kind is list:
        return f"list of {_values(inside[0])}"
    return {str: "text", int: "whole number", float: "number", bool: "true or false"}.get(
        annotation, "table"
    )


def _bounds(metadata: Iterable[Any]) -> Iterator[str]:
    words = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
    for each in metadata:
        for name, word in words.items():
            bound = getattr(each, name, None)
            if bound is not None:
                yield f"{word} {bound:,}"


def presets_page() -> str:
    """Every preset's file."""
    lead = (
        "What `--preset NAME` stands for. Without one, `rite train` takes the preset of its base "
        "and method. A `.toml` file of your own has the same form: [settings](settings.md)."
    )
    parts = ["# Presets", "", lead, ""]
    for name in sorted(preset_names()):
        text = (preset_folder() / f"{name}.toml").read_text(encoding="utf-8")
        parts += [f"## {name}", "", f"```toml\n{text.rstrip()}\n```", ""]
    return "\n".join(parts)


# --- Markdown -------------------------------------------------------------------------------------


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    if not rows:
        return []
    lines = [head, tuple("---" for _ in head), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


def _escaped(text: str) -> str:
    """Help text as Markdown: outside of `code`, signs that mean something stand for themselves."""
    parts = " ".join(text.split()).split("`")
    parts[::2] = [re.sub(r"([<>*_\[\]{}])", r"\\\1", part) for part in parts[::2]]
    return "`".join(parts)
