"""The settings of a training as keyword arguments, for editors and type checkers."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

Table = Mapping[str, Any]  # a section's settings by name


class TrainSettings(TypedDict, total=False):
    """The settings of `TrainConfig` as keyword arguments.

    `trigger`, `class_noun`, `class_photos`, `templates` and `repeats` are those of a single photo
    folder; `dataset` lists several, each with its own `photos`, `trigger` and `class_noun`.
    """

    trigger: str | None
    class_noun: str | None
    class_photos: str | None
    templates: Sequence[str]
    repeats: int
    dataset: Sequence[Table]
    base: str
    balance: bool
    method: str
    steps: int
    batch: int
    accumulate: int
    ema: float
    gradient_checkpointing: bool
    compile: bool
    seed: int
    resolution: int | None
    buckets: bool
    cache: bool
    precision: Literal["fp32", "fp16", "bf16"]
    trackers: Sequence[str]
    captions: Table
    augment: Table
    prior: Table
    lora: Table
    tokens: Table
    custom_diffusion: Table
    attention: Table
    optim: Table
    objective: Table
    validation: Table
    memory: Table
    previews: Table
    checkpoints: Table
