"""Conditioning of several prompts put together, whatever their lengths."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from rite_diffusion.backbones.ordered import rows_of
from rite_diffusion.backbones.protocols import Conditioning

MASK = "mask"  # of `extra`: (B, tokens) bool, which states are a prompt's own and no padding


def padded(states: Sequence[Tensor]) -> Conditioning:
    """States (tokens, width) of each prompt as one batch, zeros at the end, with a mask."""
    longest = max(len(each) for each in states)
    mask = torch.stack([torch.arange(longest) < len(each) for each in states])
    return Conditioning(
        torch.stack([F.pad(each, (0, 0, 0, longest - len(each))) for each in states]),
        {MASK: mask.to(states[0].device)},
    )


def own_states(conditioning: Conditioning) -> list[Tensor]:
    """The states (tokens, width) of each prompt, without padding."""
    lengths = conditioning.extra[MASK].sum(1).tolist()
    return [states[:length] for states, length in zip(conditioning.states, lengths, strict=True)]


def joined(parts: Sequence[Conditioning]) -> Conditioning:
    """The conditioning of all the parts' prompts, in order; shorter states are padded."""
    longest = max(part.states.shape[1] for part in parts)
    widened = [_widened(part, longest) for part in parts]
    extra = {name: torch.cat([part.extra[name] for part in widened]) for name in parts[0].extra}
    return Conditioning(torch.cat([part.states for part in widened]), extra)


def _widened(part: Conditioning, length: int) -> Conditioning:
    """A part with states of so many tokens; it has a mask where it has fewer."""
    missing = length - part.states.shape[1]
    if not missing:
        return part
    states = F.pad(part.states, (0, 0, 0, missing))
    return Conditioning(states, part.extra | {MASK: F.pad(part.extra[MASK], (0, missing))})


def rows(encoded: Conditioning, places: Sequence[int]) -> Conditioning:
    """The conditioning of the prompts at these places, which may repeat."""
    extra = {name: rows_of(values, places) for name, values in encoded.extra.items()}
    return Conditioning(rows_of(encoded.states, places), extra)
