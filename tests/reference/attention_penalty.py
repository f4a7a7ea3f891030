"""The penalty on attention maps cell by cell, and the maps by explicit softmax."""

from collections import defaultdict

import torch
from torch.nn import functional as F

from reference.learned_words import LiteralAttention


class KeepingAttention(LiteralAttention):
    """A literal cross-attention that keeps its shares (B, heads, cells, tokens)."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **others):
        states = encoder_hidden_states
        if states.ndim == 4:
            states = states[:, self.number]
        query, key = (
            layer(each).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for layer, each in ((attn.to_q, hidden_states), (attn.to_k, states))
        )
        self.shares = F.softmax(query @ key.mT / query.shape[-1] ** 0.5, -1)
        value = attn.to_v(states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        return attn.to_out[0]((self.shares @ value).transpose(1, 2).flatten(2))


def literal_maps(processors, samples, positions, shapes):
    """Maps (samples, n, h, w) for each shape, of all its layers' heads side by side."""
    groups = defaultdict(list)
    for processor in processors:
        groups[processor.shares.shape[2]].append(processor.shares)
    maps = []
    for height, width in shapes:
        heads = torch.cat(groups[height * width], 1)
        mean = heads.sum(1) / heads.shape[1]
        own = [mean[i][:, places] for i, places in zip(samples, positions, strict=True)]
        maps.append(torch.stack([each.T.reshape(-1, height, width) for each in own]))
    return maps


def literal_penalty(maps, subject, how):
    """Penalty of one sample: maps (n, h, w) and the subject's share (h, w) of each cell."""
    total = 0.0
    rows, columns = subject.shape
    cells = [(y, x) for y in range(rows) for x in range(columns)]
    outside = [place for place in cells if subject[place] == 0]
    for number, one in enumerate(maps):
        peak = max(one[place].item() for place in cells)
        last = number == len(maps) - 1
        if last and how == "fit":
            total += sum((one[p].item() / peak - subject[p].item()) ** 2 for p in cells) / len(
                cells
            )
        elif outside:
            spread = sum(one[place].item() / peak for place in outside) / len(outside)
            total += spread if last else spread / (len(maps) - 1)
    return total
