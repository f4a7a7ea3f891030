"""A picture that is asked for, and all that decided one: of commands, Python, studio and PNGs."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Self

from rite_diffusion.adapters.choice import Record
from rite_diffusion.backbones.prompt_syntax import read_prompt
from rite_diffusion.errors import ConfigError
from rite_diffusion.generation.composition import COMPOSITIONS, SUM
from rite_diffusion.seeding import check_seed

MOST_PICTURES, MOST_STEPS, MOST_GUIDANCE = 10_000, 1000, 100


@dataclass(frozen=True, kw_only=True)
class PictureRequest:
    """A picture that is asked for; None stands for the base model's own."""

    prompt: str
    negative: str = ""
    seed: int = 0
    steps: int | None = None
    guidance: float | None = None  # classifier-free guidance scale
    width: int | None = None  # pixels
    height: int | None = None
    regions: Sequence[str] = ()  # as `--region` takes them
    combine: str = SUM  # how several adapters act together
    controls: Sequence[str] = ()  # condition pictures and their networks

    def check(self, literal: Sequence[str] = (), num: int = 1) -> None:
        """ConfigError for what no base draws: amounts, and syntax of prompts.

        `literal` words are text in prompts; `num` pictures have seeds in a row.
        """
        if not 1 <= num <= MOST_PICTURES:
            raise ConfigError(f"{num} pictures are not between 1 and {MOST_PICTURES}")
        check_seed(self.seed, num)
        if self.steps is not None and not 1 <= self.steps <= MOST_STEPS:
            raise ConfigError(f"{self.steps} steps are not between 1 and {MOST_STEPS}")
        if self.guidance is not None and not 0 <= self.guidance <= MOST_GUIDANCE:
            raise ConfigError(f"guidance {self.guidance} is not between 0 and {MOST_GUIDANCE}")
        if self.combine not in (SUM, *COMPOSITIONS):
            known = ", ".join((SUM, *COMPOSITIONS))
            raise ConfigError(f"no way '{self.combine}' to combine adapters: choose one of {known}")
        if self.regions and self.combine != SUM:
            raise ConfigError(f"regions have their own adapters each: leave out '{self.combine}'")
        for text in (self.prompt, self.negative, *self.regions):
            read_prompt(text, literal)

    def series(self, num: int) -> list[Self]:
        """`num` requests with seeds in a row."""
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
    controls: list[str] = field(default_factory=list)
    sampler: str = "DDIM"

    def as_text(self) -> str:
        """The parameters in A1111's form."""
        lines = [self.prompt]
        if self.negative:
            lines.append(f"Negative prompt: {self.negative}")
        lines.append(
            f"Steps: {self.steps}, Sampler: {self.sampler}, CFG scale: {self.guidance:g}, "
            f"Seed: {self.seed}, Size: {self.width}x{self.height}, Model: {self.base}"
        )
        return "\n".join(lines)
