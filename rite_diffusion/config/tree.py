"""Settings as trees: presets, `key=value` lines, TOML in and out."""

import tomllib
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

import tomlkit
from pydantic import BaseModel, ValidationError

from rite_diffusion.config.memory import MemorySection
from rite_diffusion.config.schema import TrainConfig
from rite_diffusion.errors import ConfigError
from rite_diffusion.files.writing import user_path


def preset_folder() -> Path:
    """The folder of presets: in the installed package, or beside it in a checkout."""
    package = Path(__file__).parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def preset_names() -> list[str]:
    """Names that `load_preset` knows."""
    return sorted(path.stem for path in preset_folder().glob("*.toml"))


def load_preset(name: str) -> dict[str, Any]:
    """The settings of a preset, by its name, or of a TOML file, by its path.

    Raises ConfigError where there is neither.
    """
    path = user_path(name) if name.endswith(".toml") else preset_folder() / f"{name}.toml"
    known = ", ".join(preset_names())
    if name not in preset_names() and not (name.endswith(".toml") and path.is_file()):
        raise ConfigError(f"no preset '{name}': choose one of {known}, or pass a .toml file")
    return read_toml(path)


def read_toml(path: Path) -> dict[str, Any]:
    """The settings tree of a TOML file; raises ConfigError where it cannot be read."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None


def merge(low: dict[str, Any], high: dict[str, Any]) -> dict[str, Any]:
    """The two settings trees merged; leaves of `high` replace those of `low`."""
    result = dict(low)
    for key, value in high.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merge(result[key], value) if both else value
    return result


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of a settings tree, by dotted key."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        inner = flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else None
        leaves |= {prefix + key: value} if inner is None else inner
    return leaves


def nest(key: str, value: Any) -> dict[str, Any]:
    """The settings tree of one setting by its dotted key."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def parse_assignments(assignments: list[str]) -> dict[str, Any]:
    """The settings tree of assignments such as `optim.lr=1e-4`.

    Values are TOML, or else strings. Raises ConfigError where one is not `key=value`.
    """
    tree: dict[str, Any] = {}
    for assignment in assignments:
        key, sign, text = assignment.partition("=")
        if not sign or not key.strip():
            raise ConfigError(f"'{assignment}' is not key=value, such as optim.lr=1e-4")
        try:
            value = tomllib.loads(f"v = {text}")["v"]
        except tomllib.TOMLDecodeError:
            value = text.strip()
        tree = merge(tree, nest(key.strip(), value))
    return tree


def known_keys(model: type[BaseModel] = TrainConfig, prefix: str = "") -> list[str]:
    """Every dotted key of a model; keys in tables of a list have no index."""
    keys = []
    for name, info in model.model_fields.items():
        inner = next(iter(get_args(info.annotation)), info.annotation)
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            keys += known_keys(inner, f"{prefix}{name}.")
        else:
            keys.append(prefix + name)
    return keys


def explain(fault: Any, model: type[BaseModel]) -> str:
    """A message for one of pydantic's errors: the setting, its value, and what is allowed."""
    key = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        plain = ".".join(part for part in fault["loc"] if isinstance(part, str))
        near = get_close_matches(plain, known_keys(model), n=1, cutoff=0.5)
        hint = (
            f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(known_keys(model))}"
        )
        return f"unknown setting '{key}': {hint}"
    if fault["type"] == "value_error":  # of several settings together
        return f"{key}: {fault['ctx']['error']}" if key else str(fault["ctx"]["error"])
    return f"setting '{key}' = {fault['input']!r}: {fault['msg'].lower()}"


def resolve(settings: dict[str, Any]) -> TrainConfig:
    """The checked configuration of a settings tree; raises ConfigError naming every bad key."""
    try:
        return TrainConfig.model_validate(settings)
    except ValidationError as error:
        raise ConfigError(
            "; ".join(explain(fault, TrainConfig) for fault in error.errors())
        ) from None


def memory_settings(table: Mapping[str, Any]) -> MemorySection:
    """The checked settings of `[memory]`; raises ConfigError naming every bad one."""
    if not isinstance(table, Mapping):
        raise ConfigError(f'memory = {table!r} is not a table such as {{"weights": "int8"}}')
    try:
        return MemorySection.model_validate(dict(table))
    except ValidationError as error:
        faults = [fault | {"loc": ("memory", *fault["loc"])} for fault in error.errors()]
        raise ConfigError("; ".join(explain(fault, TrainConfig) for fault in faults)) from None


def to_toml(config: TrainConfig) -> str:
    """The resolved configuration as TOML text that `resolve` reads back equal."""
    return tomlkit.dumps(config.model_dump(exclude_none=True))


def from_toml(text: str) -> TrainConfig:
    """The configuration that `to_toml` wrote."""
    return resolve(tomllib.loads(text))


def without_paths(config: TrainConfig) -> TrainConfig:
    """The configuration with only the last part of each folder's path, for files to share."""
    tree = config.model_dump(exclude_none=True)
    tables = [tree, *tree["dataset"], *(own for each in tree["dataset"] for own in each["subset"])]
    for table in tables:
        for key in {"photos", "class_photos"} & table.keys():
            table[key] = Path(table[key]).name
    for key in {"assistant", "init_from"} & tree["lora"].keys():
        tree["lora"][key] = Path(tree["lora"][key]).name
    return resolve(tree)
