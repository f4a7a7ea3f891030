"""Attached adapters, with what is needed to scale them while drawing."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from rite_diffusion.adapters.attach import set_weight
from rite_diffusion.adapters.choice import Chosen
from rite_diffusion.backbones.protocols import Backbone


@dataclass(frozen=True)
class Attached:
    """An adapter attached to a backbone: its name there, its weight and its triggers."""

    name: str
    weight: float
    triggers: Sequence[str]


def attached_name(index: int) -> str:
    """The name, in the backbone, of the chosen adapter with this index."""
    return f"adapter_{index}"


def as_attached(chosen: Sequence[Chosen]) -> list[Attached]:
    """The chosen adapters with the names by which they are attached."""
    return [
        Attached(attached_name(index), each.weight, each.adapter.info.triggers())
        for index, each in enumerate(chosen)
    ]


@contextmanager
def scaled_by(
    backbone: Backbone, adapters: Sequence[Attached], factors: Sequence[float]
) -> Iterator[None]:
    """Multiply each adapter's weight by its factor until the block ends."""
    try:
        for adapter, factor in zip(adapters, factors, strict=True):
            set_weight(backbone, adapter.name, adapter.weight * factor)
        yield
    finally:
        for adapter in adapters:
            set_weight(backbone, adapter.name, adapter.weight)
