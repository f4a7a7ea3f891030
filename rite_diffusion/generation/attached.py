"""Adapters that are in a model: what a drawing must know of them to turn each up and down."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from rite_diffusion.adapters.attach import set_weight
from rite_diffusion.adapters.choice import Chosen
from rite_diffusion.backbones.protocols import Backbone


@dataclass(frozen=True)
class Attached:
    """An adapter in the backbone: its name there, its weight, and the words that call it."""

    name: str
    weight: float
    triggers: Sequence[str]


def attached_name(index: int) -> str:
    """What the adapter that was chosen at this place is called in the backbone."""
    return f"adapter_{index}"


def as_attached(chosen: Sequence[Chosen]) -> list[Attached]:
    """The chosen adapters under the names that they are attached by."""
    return [
        Attached(attached_name(index), each.weight, each.adapter.info.triggers())
        for index, each in enumerate(chosen)
    ]


@contextmanager
def scaled_by(
    backbone: Backbone, adapters: Sequence[Attached], factors: Sequence[float]
) -> Iterator[None]:
    """The backbone with each adapter's weight times its factor, until the block ends."""
    try:
        for adapter, factor in zip(adapters, factors, strict=True):
            set_weight(backbone, adapter.name, adapter.weight * factor)
        yield
    finally:
        for adapter in adapters:
            set_weight(backbone, adapter.name, adapter.weight)
