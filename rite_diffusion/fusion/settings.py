"""The settings of a fusion."""

from collections.abc import Mapping
from typing import Any, TypedDict

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rite_diffusion.config import explain
from rite_diffusion.errors import FusionError


class FusionSettings(BaseModel):
    """The settings of all fusion methods; each method uses some."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    rank: int | None = Field(
        default=None, ge=1, le=4096, description="at most this per layer; default: the method's own"
    )
    error: float | None = Field(
        default=None, gt=0, le=1, description="svd: relative Frobenius error, instead of a rank"
    )
    trim: float = Field(
        default=0.2, gt=0, le=1, description="ties, knots: share of an update's entries that stays"
    )
    keep: float = Field(
        default=0.5, gt=0, le=1, description="dare: share of an update's entries that stays"
    )
    ridge: float = Field(
        default=1e-3, gt=0, le=1, description="gram: in units of the moments' mean eigenvalue"
    )
    preserve: float = Field(
        default=0.1,
        ge=0,
        le=1000,
        description="gram: weight of the base's inputs; a concept has 1",
    )
    refine: int = Field(
        default=0, ge=0, le=10, description="times to fuse again by the fused adapter's statistics"
    )
    constraints: int = Field(
        default=8, ge=1, le=4096, description="custom_diffusion: exact directions per concept"
    )


class FusionOptions(TypedDict, total=False):
    """The settings of `FusionSettings` as keyword arguments."""

    rank: int | None
    error: float | None
    trim: float
    keep: float
    ridge: float
    preserve: float
    refine: int
    constraints: int


def checked_settings(settings: Mapping[str, Any]) -> FusionSettings:
    """The settings; FusionError names every one that is unknown or out of range."""
    try:
        return FusionSettings.model_validate(settings)
    except ValidationError as error:
        faults = (explain(fault, FusionSettings) for fault in error.errors())
        raise FusionError("; ".join(faults)) from None
