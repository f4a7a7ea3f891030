"""The `rite` command. Heavy imports are inside the commands."""

import os
import sys
from typing import Annotated, cast

import typer

from rite_diffusion.cli import adapters, fusion, generate, machine, sweep, train
from rite_diffusion.errors import RiteError
from rite_diffusion.files.writing import printable

app = typer.Typer(
    name="rite",
    help="Teach a text-to-image model your own concepts from a few photos.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


for _group in (train, sweep, generate, fusion, adapters, machine):
    app.add_typer(_group.app)

# Base class of all errors of options and arguments, which typer does not export.
_UsageError = cast(type[typer.BadParameter], typer.BadParameter.__base__)


def main() -> None:
    """Run a command; errors that the user can fix become one line and exit code 2."""
    try:
        sys.exit(app(standalone_mode=False) or 0)
    except RiteError as error:
        signal = getattr(error, "signal", None)
        _exit_with(str(error), 2 if signal is None else 128 + signal)
    except BrokenPipeError:  # the reader of a pipe has ended
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (Python flushes it on exit)
        sys.exit(1)
    except OSError as error:
        _exit_with(": ".join(filter(None, [error.filename, error.strerror or str(error)])), 2)
    except typer.Abort:
        _exit_with("stopped", 130)
    except _UsageError as error:
        _exit_with_usage(error)


def _exit_with_usage(error: typer.BadParameter) -> None:
    text, context = error.format_message(), error.ctx
    if "\n" in text:  # the help text of a command without arguments
        print(text, file=sys.stderr)
        sys.exit(2)
    _exit_with(f"{text} See {context.command_path if context else 'rite'} --help.", 2)


def _exit_with(text: str, code: int) -> None:
    print(f"rite: {printable(text)}", file=sys.stderr)
    sys.exit(code)


def _version(wanted: bool) -> None:
    if wanted:
        from rite_diffusion import __version__

        print(f"rite_diffusion {__version__}")
        raise typer.Exit


@app.callback()
def rite(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Teach a text-to-image model your own concepts from a few photos."""
