"""Requests for pictures, and the parameters of a picture; all interfaces share them."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Self

from rite_diffusion.adapters.choice import Record
from rite_diffusion.backbones.prompt_syntax import read_prompt
from rite_diffusion.errors import ConfigError
from rite_diffusion.generation.composition import COMPOSITIONS, SUM
from rite_diffusion.generation.regions import ATTENTION, PREDICTIONS
from rite_diffusion.seeding import check_seed

MAX_PICTURES, MAX_STEPS, MAX_GUIDANCE = 10_000, 1000, 100


@dataclass(frozen=True, kw_only=True)
class PictureRequest:
    """A request for a picture; None stands for the base model's default."""

    prompt: str
    negative: str = ""
    seed: int = 0
    steps: int | None = None
    guidance: float | None = None  # classifier-free guidance scale
    width: int | None = None  # pixels
    height: int | None = None
    regions: Sequence[str] = ()  # texts as of `--region`
    region_by: str | None = None  # attention or predictions
    combine: str = SUM  # sum, switch or composite
    controls: Sequence[str] = ()  # condition pictures and their networks, as of `--control`

    def check(self, literal: Sequence[str] = (), num: int = 1) -> None:
        """ConfigError for numbers out of range and prompts with invalid syntax, on any base.

        `literal` words are plain text in prompts; `num` pictures have consecutive seeds.
        """
        if not 1 <= num <= MAX_PICTURES:
            raise ConfigError(f"{num} pictures are not between 1 and {MAX_PICTURES}")
        check_seed(self.seed, num)
        if self.steps is not None and not 1 <= self.steps <= MAX_STEPS:
            raise ConfigError(f"{self.steps} steps are not between 1 and {MAX_STEPS}")
        if self.guidance is not None and not 0 <= self.guidance <= MAX_GUIDANCE:
            raise ConfigError(f"guidance {self.guidance} is not between 0 and {MAX_GUIDANCE}")
        if self.combine not in (SUM, *COMPOSITIONS):
            known = ", ".join((SUM, *COMPOSITIONS))
            raise ConfigError(f"no way '{self.combine}' to combine adapters: choose one of {known}")
        if self.region_by not in (None, ATTENTION, PREDICTIONS):
            raise ConfigError(
                f"no way '{self.region_by}' to draw regions: choose {ATTENTION} or {PREDICTIONS}"
            )
        if self.region_by and not self.regions:
            raise ConfigError(f"no regions to draw by {self.region_by}: leave it out")
        if self.regions and self.combine != SUM:
            raise ConfigError(f"regions have their own adapters each: leave out '{self.combine}'")
        for text in (self.prompt, self.negative, *self.regions):
            read_prompt(text, literal)

    def series(self, num: int) -> list[Self]:
        """`num` requests with consecutive seeds."""
        return [replace(self, seed=self.seed + index) for index in range(num)]


@dataclass(frozen=True, kw_only=True)
class Parameters(PictureRequest):
    """Everything that decides a picture's pixels."""

    steps: int = field()
    guidance: float = field()
    width: int = field()
    height: int = field()
    base: str
    base_fingerprint: str
    adapters: list[Record]
    version: str
    regions: list[str] = field(default_factory=list)
    region_by: str | None = None  # None without regions
    controls: list[str] = field(default_factory=list)
    sampler: str = "DDIM"

    def as_text(self) -> str:
        """The parameters as text in the form of A1111's web interface."""
        lines = [self.prompt]
        if self.negative:
            lines.append(f"Negative prompt: {self.negative}")
        lines.append(
            f"Steps: {self.steps}, Sampler: {self.sampler}, CFG scale: {self.guidance:g}, "
            f"Seed: {self.seed}, Size: {self.width}x{self.height}, Model: {self.base}"
        )
        return "\n".join(lines)
