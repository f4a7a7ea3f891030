"""What can be set about a fusion."""

from dataclasses import dataclass

from rite_diffusion.errors import FusionError


@dataclass(frozen=True)
class FusionSettings:
    """Settings of all methods; each reads its own. FusionError where one is out of range."""

    rank: int | None = None  # at most this per layer; None: as the method gives it
    error: float | None = None  # svd: relative Frobenius error per layer, instead of a rank
    trim: float = 0.2  # ties, knots: share of each update's entries that stays
    keep: float = 0.5  # dare: share of each update's entries that stays
    ridge: float = 1e-3  # gram: in units of the mean eigenvalue of the Gram matrices
    preserve: float = 0.1  # gram: weight of the base model's inputs; a concept's is 1
    refine: int = 0  # methods with statistics: how often these are taken anew of the fused adapter
    constraints: int = 8  # custom_diffusion: directions per concept that come out exactly

    def __post_init__(self):
        for name, value in vars(self).items():
            if value is None:
                continue
            if name in ("rank", "constraints"):
                good, wanted = type(value) is int and 1 <= value <= 4096, "a whole number to 4096"
            elif name == "refine":
                good, wanted = type(value) is int and 0 <= value <= 10, "a whole number to 10"
            elif name == "preserve":
                good, wanted = _is_number(value) and 0 <= value <= 1000, "from 0 to 1000"
            else:
                good, wanted = _is_number(value) and 0 < value <= 1, "above 0 and at most 1"
            if not good:
                raise FusionError(f"{name} = {value!r} is not {wanted}")


def _is_number(value: object) -> bool:
    return type(value) in (int, float)
