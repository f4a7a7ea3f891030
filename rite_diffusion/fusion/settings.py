"""What can be set about a fusion."""

from dataclasses import dataclass

from rite_diffusion.types import FusionError


@dataclass(frozen=True)
class FusionSettings:
    """Settings of all methods; each reads its own. FusionError where one is out of range."""

    rank: int | None = None  # at most this per layer; None: as the method gives it
    error: float | None = None  # svd: relative Frobenius error per layer, instead of a rank
    trim: float = 0.2  # ties, knots: share of each update's entries that stays
    keep: float = 0.5  # dare: share of each update's entries that stays
    ridge: float = 1e-3  # gram: in units of the mean eigenvalue of the Gram matrices
    preserve: float = 0.1  # gram: weight of the base model's inputs; a concept's is 1
    constraints: int = 8  # custom_diffusion: directions per concept that come out exactly

    def __post_init__(self):
        for name in ("rank", "constraints"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= 4096:
                raise FusionError(f"{name} {value} is not between 1 and 4096")
        for name in ("error", "trim", "keep", "ridge"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise FusionError(f"{name} {value} is not above 0 and at most 1")
        if not 0 <= self.preserve <= 1000:
            raise FusionError(f"preserve {self.preserve} is not between 0 and 1000")
