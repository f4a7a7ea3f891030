"""The `rite` command. Everything heavy is imported inside the commands."""

import sys
from typing import Annotated

import typer

from rite_diffusion.cli import adapters, fusion, generate, machine, train
from rite_diffusion.errors import RiteError

app = typer.Typer(
    name="rite",
    help="Teach a text-to-image model your own concepts from a few photos.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


for _group in (train, generate, fusion, adapters, machine):
    app.add_typer(_group.app)


def main() -> None:
    """Run a command; a RiteError becomes one line and exit code 2."""
    try:
        app()
    except RiteError as error:
        print(f"rite: {error}", file=sys.stderr)
        signal = getattr(error, "signal", None)
        sys.exit(2 if signal is None else 128 + signal)


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
