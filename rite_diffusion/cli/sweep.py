"""`rite sweep`. Heavy imports are inside the command."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rite_diffusion.cli.settings import say

if TYPE_CHECKING:
    from rite_diffusion.sweeps.definition import Definition
    from rite_diffusion.sweeps.report import SweepResult

app = typer.Typer()
BEST = 3  # candidates that are named
OWN_LINES = ("run", "reason")  # columns of the file that the terminal's table does not have


@app.command()
def sweep(
    file: Annotated[
        Path, typer.Argument(help="A .toml file with a [sweep] table, or a sweep's folder.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Folder for the run folders; default: runs/<file>.")
    ] = None,
    parallel: Annotated[
        int | None, typer.Option(help="Runs at a time; default: one on each device.")
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            help="Run on the Ray cluster at this address: auto, local or host:port.",
            metavar="ADDRESS",
        ),
    ] = None,
    status: Annotated[
        bool, typer.Option("--status", help="Print the table of the runs, and run nothing.")
    ] = False,
) -> None:
    """Train over axes of settings: one run folder for each combination, a table, plots, a sheet."""
    from rite_diffusion.api.sweep import open_sweep
    from rite_diffusion.sweeps.conduct import read_sweep, run_sweep

    definition, folder = open_sweep(file, out)
    if status:
        _print_result(read_sweep(definition, folder), definition)
        return
    result = run_sweep(definition, folder, parallel, ray, _say_now)
    _print_result(result, definition)
    for name in ("table.csv", "plots", "sheet.png"):
        if (folder / name).exists():
            say(f"{'wrote':<12}{folder / name}")
    if any(row.state == "failed" for row in result.rows):
        raise typer.Exit(1)


def _say_now(line: str) -> None:
    """Print a line at once, also into a file."""
    import sys

    say(line)
    sys.stdout.flush()


def _print_result(result: "SweepResult", definition: "Definition") -> None:
    """Print the table, how many runs are in which state, and the best candidates."""
    from collections import Counter

    from rich.console import Console
    from rich.table import Table

    from rite_diffusion.sweeps.report import table

    score = definition.section.score
    heads, lines = table(result, score)
    shown = Table(box=None, header_style="", pad_edge=False)
    columns = [index for index, head in enumerate(heads) if head not in OWN_LINES]
    for index in columns:
        shown.add_column(heads[index].replace("_", " "), overflow="fold")
    for line in lines:
        shown.add_row(*(line[index] for index in columns))
    Console(markup=False, highlight=False).print(shown)
    counts = Counter(row.state for row in result.rows)
    say(f"{'runs':<12}{', '.join(f'{count} {state}' for state, count in counts.items())}")
    for row in result.rows:
        if row.state == "failed":
            say(f"{'failed':<12}{row.name}: {row.reason}")
    if not result.ranking:
        say(f"{'best':<12}unknown: no candidate has a {score} score for all its runs")
    for place, each in enumerate(result.ranking[:BEST]):
        name = "best" if place == 0 else ""
        runs = len(each.jobs)
        of = f", mean of {runs} runs" if runs > 1 else ""
        say(f"{name:<12}{each.name}: {score} {each.score:.4g}{of}")
