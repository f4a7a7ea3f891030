"""The settings of an adapter: its kind and size, where it attaches, and what it starts from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from rite_diffusion.config.section import Section

if TYPE_CHECKING:
    from rite_diffusion.config.schema import TrainConfig


class LoraSection(Section):
    """The adapter's size and where it attaches."""

    kind: Literal["lora", "rslora", "dora", "loha", "lokr"] = Field(
        default="lora",
        description="rslora: scale = alpha / √rank; dora: magnitudes train too; loha, lokr: "
        "Hadamard and Kronecker products",
    )
    rank: int = Field(default=8, ge=1, le=1024, description="rank of every pair")
    alpha: float | None = Field(
        default=None, gt=0, description="scale = alpha / rank; default: rank, of rslora √rank"
    )
    factor: int = Field(
        default=8, ge=1, le=1024, description="lokr: most rows and columns of the first matrix"
    )
    full_matrix: bool = Field(
        default=False, description="lokr: the second matrix is whole, not a product of lora.rank"
    )
    text_encoder: bool = Field(default=True, description="adapt the text encoder's attention too")
    layers: Literal["attention", "blocks"] = Field(
        default="attention", description="or all layers of the denoiser's blocks, convolutions too"
    )
    init: Literal["gaussian", "pissa", "lora_one"] = Field(
        default="gaussian",
        description="start of the pairs: no update; pissa: from the weights' leading directions; "
        "lora_one: along the first gradient's",
    )
    init_size: float = Field(
        default=0.1, gt=0, le=1, description="lora_one: spectral norm of each layer's first update"
    )
    init_from: str | None = Field(
        default=None, description="adapter file to start from, whose rank and alpha then apply"
    )
    assistant: str | None = Field(
        default=None,
        description="an adapter that acts while this one trains, for distilled few-step bases",
    )
    distilled: bool = Field(
        default=False, description="train on a distilled base without an assistant all the same"
    )


def lora_conflict(config: TrainConfig) -> str:
    """Why an adapter cannot train as the settings say, and what to set; empty if it can."""
    return _kind_conflict(config.lora) or _start_conflict(config)


def _kind_conflict(lora: LoraSection) -> str:
    if lora.full_matrix and lora.kind != "lokr":
        return "lora.full_matrix is for lora.kind = lokr"
    if lora.full_matrix and lora.alpha is not None:
        return "lora.alpha has no effect with lora.full_matrix, whose scale is 1: leave it out"
    return ""


def _start_conflict(config: TrainConfig) -> str:
    lora, custom = config.lora, config.custom_diffusion
    if lora.init_from and (config.method, lora.kind) != ("lora", "lora"):
        return "lora.init_from is for method lora and lora.kind = lora"
    if lora.init == "gaussian":
        return ""
    if lora.init_from:
        return f"lora.init = {lora.init} and lora.init_from both say where pairs start: leave one"
    if lora.kind not in ("lora", "rslora"):
        return f"lora.init = {lora.init} is for lora.kind = lora or rslora"
    if config.method == "custom_diffusion" and custom.weights == "full":
        return f"lora.init = {lora.init} is for pairs: set custom_diffusion.weights = lora"
    return _gradient_conflict(config) if lora.init == "lora_one" else ""


def _gradient_conflict(config: TrainConfig) -> str:
    if config.optim.name == "scaled_sgd":
        return (
            "lora.init = lora_one: scaled_sgd leaps from a start with weak directions. Use another "
            "optimizer, such as rite"
        )
    if config.tokens.first:
        return "lora.init = lora_one is for pairs that train from the first step: tokens.first = 0"
    return ""
