"""The adapters of a fusion, checked and sorted, and their layers."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from rite_diffusion.adapters import Adapter
from rite_diffusion.adapters.attach import as_matrix_shape, is_other_base
from rite_diffusion.errors import FusionError
from rite_diffusion.fusion.layer import Layer, Part, flat, zero_update
from rite_diffusion.fusion.second_moments import mean
from rite_diffusion.fusion.sketch import Sketch
from rite_diffusion.types import LoraPair


@dataclass(frozen=True)
class Member:
    """An adapter in a fusion, its weight, and the statistics of its concept."""

    adapter: Adapter
    weight: float
    file: Path
    sketch: Sketch | None = None
    plain: Adapter | None = None  # of an adapter with DoRA layers: the same with plain updates

    @cached_property
    def digest(self) -> str:
        """Digest of the adapter's tensors."""
        return digest_of(self.adapter)

    @cached_property
    def pairs(self) -> dict[str, LoraPair]:
        """The adapter's pairs by layer name."""
        return {pair.name: pair for pair in (self.plain or self.adapter).pairs}

    @property
    def label(self) -> str:
        """The trigger, or the file's name where there is no trigger."""
        return self.adapter.info.trigger or self.file.name


def digest_of(adapter: Adapter) -> str:
    """First 16 hex digits of a SHA-256 over pairs, shifts and embeddings, sorted by name."""
    digest = hashlib.sha256()
    for pair in sorted(adapter.pairs, key=lambda pair: pair.name):
        digest.update(f"{pair.name} {pair.scale!r} {tuple(pair.down.shape)}".encode())
        for part in (pair.down, pair.up, pair.magnitude):
            if part is not None:
                digest.update(_content(part))
    for shift in sorted(adapter.shifts, key=lambda shift: (shift.name, shift.parameter)):
        digest.update(f"{shift.name} {shift.parameter}".encode() + _content(shift.values))
    for word, rows in sorted(adapter.tokens.items()):
        digest.update(f"{word} {tuple(rows.shape)}".encode() + _content(rows))
    return digest.hexdigest()[:16]


def _content(values: Tensor) -> bytes:
    return values.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def check_and_sort(members: Sequence[Member]) -> list[Member]:
    """The members sorted by trigger and digest, so that the order of arguments does not matter.

    FusionError where there are none, two are the same or share a trigger, a weight is 0, or bases
    or shapes differ.
    """
    if not members:
        raise FusionError("no adapters to fuse: pass their files.")
    _refuse_repetition(members)
    for member in members:
        if member.weight == 0:
            raise FusionError(f"{member.file} has weight 0: leave it out.")
    _refuse_other_bases(members)
    _refuse_other_shapes(members)
    return sorted(members, key=lambda member: (member.label, member.digest))


def _refuse_repetition(members: Sequence[Member]) -> None:
    known: dict[str, Path] = {}
    triggers: dict[str, Path] = {}
    for member in members:
        if member.digest in known:
            raise FusionError(
                f"{member.file} holds the same adapter as {known[member.digest]}: "
                f"pass it once, with a larger weight such as {member.file}:2."
            )
        known[member.digest] = member.file
        for trigger in member.adapter.info.triggers():
            if trigger in triggers:
                raise FusionError(
                    f"{member.file} and {triggers[trigger]} both have the trigger '{trigger}', so "
                    "no prompt could call only one: train one of them with another trigger."
                )
            triggers[trigger] = member.file


def _refuse_other_bases(members: Sequence[Member]) -> None:
    first = next((m for m in members if m.adapter.info.base_fingerprint), None)
    for member in members:
        info = member.adapter.info
        if first and is_other_base(info.base_fingerprint, first.adapter.info.base_fingerprint):
            raise FusionError(
                f"{member.file} was trained on {info.base or 'an unnamed base'} and {first.file} "
                f"on {first.adapter.info.base or 'an unnamed base'}, whose weights differ: only "
                "adapters of one base model can be fused."
            )


def _refuse_other_shapes(members: Sequence[Member]) -> None:
    shapes: dict[str, tuple[tuple[int, ...], Path]] = {}
    for member in members:
        for pair in member.adapter.pairs:
            shape = as_matrix_shape((pair.up.shape[0], *pair.down.shape[1:]))
            other, file = shapes.setdefault(pair.name, (shape, member.file))
            if shape != other:
                raise FusionError(
                    f"{pair.name} is for weights {shape} in {member.file} and {other} in {file}: "
                    "the adapters are for different base models."
                )


def layers(members: Sequence[Member]) -> Iterator[tuple[Layer, torch.Size]]:
    """Every layer that a member adapts, with the shape (in,) or (in, k, k) of its kernel.

    A 1x1 convolution, which some files store as a matrix, has the shape in the first adapter.
    """
    for name in sorted({name for member in members for name in member.pairs}):
        example = next(m.pairs[name] for m in members if name in m.pairs)
        empty = zero_update(flat(example, 1.0))
        parts = [
            Part(
                member.digest,
                flat(member.pairs[name], member.weight) if name in member.pairs else empty,
                member.sketch.concept.get(name) if member.sketch else None,
            )
            for member in members
        ]
        sketches = [member.sketch for member in members if member.sketch]
        base = [sketch.base[name] for sketch in sketches if name in sketch.base]
        yield Layer(name, parts, mean(base) if base else None), example.down.shape[1:]
