"""Shifts of biases and norms of several adapters, merged."""

from collections.abc import Sequence
from dataclasses import replace

from rite_diffusion.errors import FusionError
from rite_diffusion.fusion.members import Member
from rite_diffusion.types import Shift

SUMMING = ("concat", "svd", "weighted")  # methods that are sums of the updates


def merge_shifts(members: Sequence[Member], method: str) -> list[Shift]:
    """The sum of the members' shifts times their weights.

    FusionError where a member has shifts and the method is not a sum, or where shapes differ.
    """
    merged: dict[tuple[str, str], Shift] = {}
    for member in members:
        if member.adapter.shifts and len(members) > 1 and method not in SUMMING:
            raise FusionError(
                f"{member.file} changes {len(member.adapter.shifts)} biases and norms, which "
                f"'{method}' cannot fuse: choose one of {', '.join(SUMMING)}."
            )
        for shift in member.adapter.shifts:
            place = shift.name, shift.parameter
            values = member.weight * shift.values
            if place in merged and merged[place].values.shape != values.shape:
                raise FusionError(f"{shift.name} has another shape in {member.file}")
            known = merged[place].values if place in merged else 0
            merged[place] = replace(shift, values=known + values)
    return [merged[place] for place in sorted(merged)]
