"""The settings of a training as keyword arguments, for editors and type checkers."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

Table = Mapping[str, Any]  # a section's settings by name


class TrainSettings(TypedDict, total=False):
    """What `TrainConfig` takes; a test holds the names against it.

    `trigger`, `class_noun` and the like are for one photo folder; `dataset` lists several, with a
    `photos`, `trigger` and `class_noun` each.
    """

    trigger: str | None
    class_noun: str | None
    class_photos: str | None
    templates: Sequence[str]
    repeats: int
    dataset: Sequence[Table]
    base: str
    balance: bool
    method: Literal["lora", "pivotal", "custom_diffusion", "ed_lora"]
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
    previews: Table
    checkpoints: Table
