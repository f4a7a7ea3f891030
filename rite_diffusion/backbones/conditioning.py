"""Conditioning of several prompts put together, whatever their lengths."""

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from rite_diffusion.backbones.ordered import rows_of
from rite_diffusion.backbones.protocols import Conditioning

# Of `extra`, (B, tokens) bool each:
MASK = "mask"  # which states are a prompt's own and no padding
SEEN = "seen"  # which states the denoiser attends to


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


def side_by_side(
    parts: Sequence[Conditioning], extra: dict[str, Tensor]
) -> tuple[Conditioning, Tensor]:
    """Several texts for each row as one, and the number of tokens (B, parts) of each.

    Padding at the end of a masked text is left out. `extra` is that of the whole picture; what
    tells of single tokens is concatenated instead.
    """
    if MASK in extra and all(_is_at_end(part.extra[MASK]) for part in parts):
        texts = [own_states(part) for part in parts]
        rows = [torch.cat(row) for row in zip(*texts, strict=True)]
        lengths = [[len(states) for states in row] for row in zip(*texts, strict=True)]
        return padded(rows), torch.tensor(lengths)
    counts = [part.states.shape[1] for part in parts]
    by_token = {
        name: torch.cat([part.extra[name] for part in parts], 1)
        for name in (MASK, SEEN)
        if name in extra
    }
    states = torch.cat([part.states for part in parts], 1)
    return Conditioning(states, extra | by_token), torch.tensor([counts] * len(states))


def _is_at_end(mask: Tensor) -> bool:
    """Whether padding (B, tokens; False in the mask) comes after all other tokens."""
    return torch.equal(mask, mask.cummin(1).values)


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


class KeptConditioning:
    """The conditioning of prompts, the latest used kept in main memory up to so many bytes."""

    def __init__(self, encode: Callable[[str], Conditioning], most: int, device: torch.device):
        self._encode, self._most, self._device = encode, most, device
        self._kept: OrderedDict[str, Conditioning] = OrderedDict()
        self._bytes = 0

    def __call__(self, prompt: str) -> Conditioning:
        """The conditioning of a prompt on the device, encoded where it is not kept."""
        found = self._kept.pop(prompt, None)
        if found is None:
            found = moved(self._encode(prompt), torch.device("cpu"))
            self._bytes += _size(found)
        self._kept[prompt] = found
        while self._bytes > self._most and len(self._kept) > 1:
            _, oldest = self._kept.popitem(last=False)
            self._bytes -= _size(oldest)
        return moved(found, self._device)


def moved(conditioning: Conditioning, device: torch.device) -> Conditioning:
    """The conditioning on a device."""
    extra = {name: values.to(device) for name, values in conditioning.extra.items()}
    return Conditioning(conditioning.states.to(device), extra)


def _size(conditioning: Conditioning) -> int:
    return sum(each.nbytes for each in (conditioning.states, *conditioning.extra.values()))
