"""`rite.sweep`: many trainings over axes of settings."""

import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tomlkit
from tomlkit.exceptions import TOMLKitError

from rite_diffusion.errors import ConfigError
from rite_diffusion.files.writing import folder_output, user_path
from rite_diffusion.sweeps.conduct import read_sweep, run_sweep
from rite_diffusion.sweeps.definition import Definition, read_definition, read_definition_file
from rite_diffusion.sweeps.report import SweepResult


def sweep(
    file: str | Path | Mapping[str, Any],
    *,
    out: str | Path | None = None,
    parallel: int | None = None,
    ray: str | None = None,
    on_line: Callable[[str], None] = lambda line: None,
) -> SweepResult:
    """Run a sweep and return its runs and the ranking of its candidates.

    `file` is a `.toml` file with the settings of a training and a table `[sweep]`, the same as a
    dict, or the folder of a sweep to go on with. Runs are folders below `out`, by default
    `runs/<name of the file>` (`runs/sweep` for a dict). Finished runs are not repeated, and others
    go on from their checkpoints. They run on this machine, `parallel` at a time, by default one on
    each device; or on the Ray cluster at the address `ray`: "auto", "local" or "host:port".
    `on_line` is called with a line about each run that ends. Raises RiteError for a sweep that
    cannot be run, and SweepStopped after Ctrl-C or SIGTERM.
    """
    definition, folder = open_sweep(file, out)
    return run_sweep(definition, folder, parallel, ray, on_line)


def sweep_status(
    file: str | Path | Mapping[str, Any], *, out: str | Path | None = None
) -> SweepResult:
    """What there is of a sweep, which may be running; takes `file` and `out` as `sweep` does."""
    return read_sweep(*open_sweep(file, out))


def open_sweep(
    file: str | Path | Mapping[str, Any], out: str | Path | None
) -> tuple[Definition, Path]:
    """A sweep's definition and its folder."""
    if isinstance(file, Mapping):
        return read_definition(_as_toml(file)), folder_output(out or Path("runs/sweep"))
    path = user_path(file)
    if path.is_dir():
        if not (path / "sweep.toml").is_file():
            raise ConfigError(f"{path} is not a sweep's folder: give one, or a .toml file.")
        return read_definition_file(path / "sweep.toml"), folder_output(out or path)
    definition = read_definition_file(path)
    return definition, folder_output(out or Path("runs") / path.stem)


def _as_toml(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings as a TOML file would give them."""
    try:
        return tomllib.loads(tomlkit.dumps(settings))
    except (TOMLKitError, TypeError, ValueError) as error:
        raise ConfigError(f"the sweep cannot be written as TOML: {error}") from None
