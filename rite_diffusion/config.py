"""Settings: strict models, TOML in and out, presets.

One rule: a default is written once, here or in a preset; an unknown key is an error that names the
nearest known one.
"""

import tomllib
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

import tomlkit
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rite_diffusion.types import ConfigError

Rate = Annotated[float, Field(gt=0, le=10, allow_inf_nan=False)]


class Section(BaseModel):
    """A table of the TOML file."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class LoraSection(Section):
    """The adapter's size and where it attaches."""

    rank: int = Field(default=8, ge=1, le=1024, description="rank of every pair")
    alpha: float | None = Field(
        default=None, gt=0, description="scale = alpha / rank; default: rank"
    )
    text_encoder: bool = Field(default=True, description="adapt the text encoder's attention too")


class OptimSection(Section):
    """The optimizer; rates that are not set fall back to `lr`, and that to the optimizer's own."""

    name: str = Field(default="adamw", description="see rite_diffusion.optim.OPTIMIZERS")
    lr: Rate | None = Field(default=None, description="default: the optimizer's own")
    lr_unet: Rate | None = Field(default=None, description="of the UNet's pairs; default: lr")
    lr_text_encoder: Rate | None = Field(default=None, description="default: half of lr")
    options: dict[str, Any] = Field(
        default={}, description="the optimizer's own, such as {damping = 1e-4}"
    )
    weight_decay: float = Field(default=0.01, ge=0, le=1)
    clip_norm: float = Field(default=1.0, gt=0, description="bound on the norm of all gradients")
    warmup: int = Field(default=10, ge=0, description="steps")
    schedule: Literal["constant", "cosine", "linear"] = "cosine"


class ObjectiveSection(Section):
    """What the loss weighs."""

    loss: Literal["mse", "huber"] = "mse"
    huber_delta: float = Field(default=0.1, gt=0, description="errors above it count linearly")
    weighting: Literal["none", "min_snr", "debiased"] = Field(
        default="none", description="of timesteps: Hang et al. 2023, Yu et al. 2023"
    )
    min_snr_gamma: float = Field(default=5.0, gt=0)
    timesteps: Literal["uniform", "logit_normal"] = "uniform"
    timestep_mean: float = Field(default=0.0, description="of logit_normal")
    timestep_deviation: float = Field(default=1.0, gt=0, description="of logit_normal")
    noise_offset: float = Field(
        default=0.0, ge=0, le=1, description="share of noise that is one value per channel"
    )
    input_perturbation: float = Field(
        default=0.0, ge=0, le=1, description="extra noise that the target ignores: Ning et al. 2023"
    )
    mask_floor: float = Field(
        default=0.1, ge=0, le=1, description="weight of what a mask leaves out; 1: no masks"
    )
    caption_dropout: float = Field(
        default=0.0, ge=0, lt=1, description="share of steps without caption"
    )


class PreviewSection(Section):
    """Pictures made while training."""

    every: int = Field(default=100, ge=0, description="steps; 0: none")
    prompts: list[str] = Field(
        default=["a {trigger} on a blue background", "a {trigger} on a green background"]
    )
    steps: int = Field(default=20, ge=1)
    guidance: float = Field(default=3.0, ge=0)
    seed: int = Field(default=0, ge=0)


class CheckpointSection(Section):
    """How often the adapter is written while training."""

    every: int = Field(default=100, ge=1, description="steps")
    keep: int = Field(default=2, ge=1, description="newest checkpoints to keep")


class TrainConfig(Section):
    """Everything that decides a training run."""

    base: str = Field(
        "pocket", description="`pocket`, a hub id, a diffusers folder or a .safetensors"
    )
    photos: str = Field(description="folder with the pictures")
    trigger: str = Field(min_length=1, max_length=64)
    class_noun: str = Field(min_length=1, max_length=64)
    method: Literal["lora"] = "lora"
    steps: int = Field(default=300, ge=1, le=1_000_000)
    batch: int = Field(default=4, ge=1, le=1024)
    accumulate: int = Field(
        default=1, ge=1, le=1024, description="batches whose gradients one step adds up"
    )
    ema: float = Field(
        default=0.0, ge=0, lt=1, description="decay of averaged weights, which are saved; 0: none"
    )
    gradient_checkpointing: bool = Field(default=False, description="less memory, more time")
    seed: int = Field(default=0, ge=0, lt=2**32)
    resolution: int | None = Field(
        default=None, ge=16, le=4096, description="pixels; default: the base's"
    )
    templates: list[str] = Field(
        default=["a {trigger}", "a photo of a {trigger}"],
        min_length=1,
        description="captions of pictures that have none, in turn",
    )
    buckets: bool = Field(
        default=False, description="keep the pictures' shapes; else they are cut to squares"
    )
    flip: bool = Field(default=False, description="mirror half of the pictures")
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    lora: LoraSection = LoraSection()
    optim: OptimSection = OptimSection()
    objective: ObjectiveSection = ObjectiveSection()
    previews: PreviewSection = PreviewSection()
    checkpoints: CheckpointSection = CheckpointSection()


def preset_folder() -> Path:
    """Where the presets lie: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def preset_names() -> list[str]:
    """Names that `load_preset` knows."""
    return sorted(path.stem for path in preset_folder().glob("*.toml"))


def load_preset(name: str) -> dict[str, Any]:
    """Settings of a preset by its name, or of any TOML file by its path."""
    path = Path(name) if name.endswith(".toml") else preset_folder() / f"{name}.toml"
    if not path.is_file():
        known = ", ".join(preset_names())
        raise ConfigError(f"no preset '{name}': choose one of {known}, or pass a .toml file")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None


def merge(low: dict[str, Any], high: dict[str, Any]) -> dict[str, Any]:
    """The two settings trees as one; `high` wins leaf by leaf."""
    result = dict(low)
    for key, value in high.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merge(result[key], value) if both else value
    return result


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of a settings tree by their dotted keys."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        inner = flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else None
        leaves |= {prefix + key: value} if inner is None else inner
    return leaves


def parse_assignments(assignments: list[str]) -> dict[str, Any]:
    """Settings tree of `optim.lr=1e-4` lines; values are TOML, bare words are strings."""
    tree: dict[str, Any] = {}
    for assignment in assignments:
        key, sign, text = assignment.partition("=")
        if not sign or not key.strip():
            raise ConfigError(f"'{assignment}' is not key=value, such as optim.lr=1e-4")
        try:
            value = tomllib.loads(f"v = {text}")["v"]
        except tomllib.TOMLDecodeError:
            value = text
        branch: Any = value
        for part in reversed(key.strip().split(".")):
            branch = {part: branch}
        tree = merge(tree, branch)
    return tree


def known_keys(model: type[BaseModel] = TrainConfig, prefix: str = "") -> list[str]:
    """Every dotted key of a model."""
    keys = []
    for name, info in model.model_fields.items():
        section = info.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            keys += known_keys(section, f"{prefix}{name}.")
        else:
            keys.append(prefix + name)
    return keys


def _explain(fault: Any) -> str:
    key = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        near = get_close_matches(key, known_keys(), n=1, cutoff=0.5)
        hint = f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(known_keys())}"
        return f"unknown setting '{key}': {hint}"
    if fault["type"] == "missing":
        return f"setting '{key}' is missing"
    return f"setting '{key}' = {fault['input']!r}: {fault['msg'].lower()}"


def resolve(settings: dict[str, Any]) -> TrainConfig:
    """The checked configuration of a settings tree; raises ConfigError naming every bad key."""
    try:
        return TrainConfig.model_validate(settings)
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(fault) for fault in error.errors())) from None


def to_toml(config: TrainConfig) -> str:
    """The resolved configuration as TOML text that `resolve` reads back equal."""
    return tomlkit.dumps(config.model_dump(exclude_none=True))


def from_toml(text: str) -> TrainConfig:
    """The configuration that `to_toml` wrote."""
    return resolve(tomllib.loads(text))
