"""Every command and public function with bad input: one line, exit code 2, nothing changed.

Both walks are made from the typer app and from signatures: what is new enters by itself. A value is
chosen by a parameter's name and type; drawing and encoding stop at `Reached`, which says that every
check was passed.
"""

import importlib
import inspect
import io
import os
import pkgutil
import shutil
import sys
import tempfile
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import get_type_hints

import pytest
import typer
from diffusers import AutoencoderKL, UNet2DConditionModel

import rite_diffusion as rite
from bad_values import GOOD, bad_values, kind_of, make_world
from rite_diffusion.backbones.source import load_backbone
from rite_diffusion.cli.app import app, main
from rite_diffusion.errors import RiteError

COMMANDS = typer.main.get_command(app).commands
FUNCTIONS = {
    name: getattr(rite, name)
    for name in rite.__all__
    if inspect.isfunction(getattr(rite, name)) and name not in ("draw_batch", "diffusion_loss")
}  # those two take tensors, not what a user writes
OBJECTS = {"backbone"}  # a parameter that is no text: the pocket base

# No adapter: the base alone. A base that a fusion of one adapter does not open.
NO_FAULT = {("grid", "adapter", ""), ("grid", "adapters", "")} | {
    ("fuse", "base", value)
    for value in ("missing", "a\0b", "x" * 300, "loop", "garbage", "broken_base")
}


class Reached(BaseException):
    """All checks were passed and work would begin."""


class Damage(AssertionError):
    """What should not happen."""


def snapshot(folder: Path) -> dict[str, object]:
    """What a folder holds, and when each file was written."""
    return {
        str(path.relative_to(folder)): (path.lstat().st_mtime_ns, path.lstat().st_size)
        if not path.is_dir()
        else None
        for path in folder.rglob("*")
    }


@pytest.fixture(scope="module")
def world():
    """A folder to work in, readable by everyone."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    make_world(folder / "world")
    yield folder / "world"
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def base():
    """One pocket base for all calls."""
    return load_backbone("pocket")


@pytest.fixture
def prepared(world, base, monkeypatch):
    """The world as the working folder; opening the pocket is quick, and work stops at `Reached`."""

    def reached(*_, **__):
        raise Reached

    def open_base(name="pocket", *rest, **options):
        return base if name == "pocket" else load_backbone(name, *rest, **options)

    for module in pkgutil.walk_packages(rite.__path__, "rite_diffusion."):
        if not module.name.endswith("__main__"):
            loaded = importlib.import_module(module.name)
            if getattr(loaded, "load_backbone", None) is load_backbone:
                monkeypatch.setattr(loaded, "load_backbone", open_base)
    monkeypatch.setattr(UNet2DConditionModel, "forward", reached)
    monkeypatch.setattr(AutoencoderKL, "encode", reached)
    monkeypatch.setattr(sys.modules["rite_diffusion.studio.app"], "build", reached)
    monkeypatch.chdir(world)
    return world


@contextmanager
def unchanged(world: Path):
    """Raises Damage where the world is another afterwards, and makes it anew."""
    before = snapshot(world)
    passed = False
    try:
        yield
    except Reached:
        passed = True
    finally:
        changed = before.items() ^ snapshot(world).items()
        if changed:
            for path in world.iterdir():
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            make_world(world.parent / "again")
            for path in (world.parent / "again").iterdir():
                path.rename(world / path.name)
            (world.parent / "again").rmdir()
    if changed and not passed:
        raise Damage(f"changed {sorted(str(name) for name, _ in changed)[:4]}")


def run_line(line: list[str]) -> tuple[int, str, str]:
    """Exit code and output of a command in this process; Damage where it is a traceback."""
    out, errors = io.StringIO(), io.StringIO()
    code: object = None
    with redirect_stdout(out), redirect_stderr(errors), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["rite", *line])
        try:
            main()
        except SystemExit as end:
            code = end.code
        except Reached:
            raise
        except BaseException as error:
            raise Damage(f"{type(error).__name__}: {error}"[:200]) from None
    return (
        int(code or 0) if isinstance(code, int) or code is None else 1,
        out.getvalue(),
        errors.getvalue(),
    )


def check_line(world: Path, line: list[str], certain: bool) -> None:
    """Damage where a command neither goes through nor refuses in one line with code 2."""
    finished = None
    with unchanged(world):
        code, _, errors = run_line(line)
        finished = code
        if code == 0:
            raise Reached
        if code != 2 or errors.count("\n") != 1 or not errors.startswith("rite: "):
            raise Damage(f"code {code}, {errors[:200]!r}")
        if not errors.rstrip("\n").isprintable():
            raise Damage(f"control codes in {errors[:200]!r}")
    if certain and finished != 2:
        raise Damage("was not refused")


def line_of(command, changed=None, value=None) -> list[str]:
    """A command line with all that is required, and one parameter's value."""
    options, arguments = [command.name], []
    for parameter in command.params:
        own = parameter is changed
        if not (parameter.required or own or parameter.name in ("trigger", "class_noun")):
            continue
        text = value if own else GOOD.get(parameter.name.strip("_"), "x")
        if parameter.param_type_name == "argument":
            arguments.append(text)
        else:
            options += [f"{max(parameter.opts, key=len)}={text}"]
    return [*options, "--", *arguments]


def kinds_of(command) -> dict[str, str]:
    """The kind of each of a command's parameters, by the types of its function."""
    types = get_type_hints(command.callback)
    return {name: kind_of(name, kind) for name, kind in types.items() if name != "return"}


PARAMETERS = [
    (name, parameter, kind)
    for name, command in COMMANDS.items()
    for parameter, kind in kinds_of(command).items()
    if kind != "flag"
]


@pytest.mark.parametrize(("name", "parameter", "kind"), PARAMETERS)
def test_commands_refuse_bad_input_in_one_line(prepared, name, parameter, kind):
    command = COMMANDS[name]
    [changed] = [each for each in command.params if each.name == parameter]
    faults = []
    for value, certain in bad_values(kind).items():
        line = line_of(command, changed, value)
        try:
            check_line(prepared, line, certain and (name, parameter, value) not in NO_FAULT)
        except Damage as fault:
            faults.append(f"{line[:1] + line[1:]} -> {fault}"[:400])
    assert not faults, "\n".join(faults)


def parameters_of(function) -> list[inspect.Parameter]:
    """A function's parameters, the settings of a training each by its own name."""
    own = list(inspect.signature(function).parameters.values())
    if own[-1].kind is not inspect.Parameter.VAR_KEYWORD:
        return own
    keyword = inspect.Parameter.KEYWORD_ONLY
    hints = get_type_hints(own[-1].annotation.__args__[0])  # of Unpack
    return own[:-1] + [
        inspect.Parameter(name, keyword, default=None, annotation=hint)
        for name, hint in hints.items()
    ]


def arguments_of(function, changed: str, value, base) -> tuple[list, dict]:
    """Arguments with all that is required, and one parameter's value."""
    positional, named = [], {}
    for parameter in parameters_of(function):
        own = parameter.name == changed
        needed = parameter.default is parameter.empty
        if not (own or needed or parameter.name in ("photos", "trigger", "class_noun")):
            continue
        given = value if own else GOOD.get(parameter.name, "x")
        given = base if parameter.name in OBJECTS else given
        if "Sequence" in str(parameter.annotation):
            given = [given]
        if parameter.kind is parameter.KEYWORD_ONLY:
            named[parameter.name] = given
        else:
            positional.append(given)
    return positional, named


def api_value(kind: str, annotation: str, value: str):
    """A value as Python code would pass it; None where its type says that it is wrong."""
    if kind != "number":
        return value
    try:
        return (
            int(value)
            if value not in ("nan", "1e999") or "float" not in annotation
            else float(value)
        )
    except ValueError:
        return None


API = [
    (name, parameter.name)
    for name, function in FUNCTIONS.items()
    for parameter in parameters_of(function)
    if kind_of(parameter.name, parameter.annotation) != "flag"
    and parameter.name not in {"drawing", *OBJECTS}
]


@pytest.mark.parametrize(("name", "parameter"), API)
def test_functions_refuse_bad_input_with_a_rite_error(prepared, base, name, parameter):
    function = FUNCTIONS[name]
    [annotation] = [p.annotation for p in parameters_of(function) if p.name == parameter]
    kind = kind_of(parameter, annotation)
    faults = []
    for text, certain in bad_values(kind).items():
        value = api_value(kind, str(annotation), text)
        if value is None or (kind == "output" and text == ""):
            continue
        positional, named = arguments_of(function, parameter, value, base)
        try:
            certain &= (name, parameter, value) not in NO_FAULT
            check_call(prepared, function, positional, named, certain)
        except Damage as fault:
            faults.append(f"{name}({positional}, {named}) -> {fault}"[:400])
    assert not faults, "\n".join(faults)


def check_call(world: Path, function, positional, named, certain: bool) -> None:
    """Damage where a function raises anything but a RiteError, or refuses and leaves something."""
    refused = False
    with unchanged(world), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        try:
            function(*positional, **named)
            raise Reached
        except RiteError:
            refused = True
        except (Reached, Damage):
            raise
        except BaseException as error:
            raise Damage(f"{type(error).__name__}: {error}"[:200]) from None
    if certain and not refused:
        raise Damage("was not refused")


@contextmanager
def as_nobody():
    """Without the rights of root, for which nothing is unreadable."""
    if os.geteuid() != 0:
        yield
        return
    "".encode("utf-8-sig")  # a codec is loaded from a file, which nobody may not be able to read
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


PATHS = [each for each in PARAMETERS if each[2] in ("file", "folder", "output", "path")]


@pytest.mark.parametrize(("name", "parameter", "kind"), PATHS)
def test_unreadable_and_unwritable_paths_are_errors_of_one_line(prepared, name, parameter, kind):
    command = COMMANDS[name]
    [changed] = [each for each in command.params if each.name == parameter]
    shut, closed = prepared / "shut", prepared / "closed.safetensors"
    shutil.copytree(prepared / "photos", shut)
    shutil.copy(prepared / "a.safetensors", closed)
    closed.chmod(0)
    shut.chmod(0)
    values = {
        "output": ["shut", "shut/x.png", "shut/x.safetensors", "new/x.png", "new.safetensors"],
        "folder": ["shut", "shut/0.png"],
    }.get(kind, ["closed.safetensors", "shut", "shut/0.png"])
    faults = []
    try:
        with as_nobody():
            for value in values:
                line = line_of(command, changed, value)
                try:
                    check_line(prepared, line, certain=True)
                except Damage as fault:
                    faults.append(f"{line} -> {fault}"[:400])
    finally:
        shut.chmod(0o755)
        shutil.rmtree(shut)
        closed.unlink()
    assert not faults, "\n".join(faults)


def test_bad_input_tests_cover_every_command_and_function():
    assert {name for name, _, _ in PARAMETERS} >= COMMANDS.keys() - {"doctor"}
    assert {name for name, _ in API} == FUNCTIONS.keys() >= {"train", "generate", "convert", "fuse"}
    kinds = {kind for command in COMMANDS.values() for kind in kinds_of(command).values()}
    assert kinds == {"file", "folder", "output", "named", "choice", "number", "text", "flag"}
