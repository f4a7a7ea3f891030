"""All that is encoded for a batch of prompts, and the states that come of it.

A prompt is encoded chunk by chunk, and where it says a layer-wise word once for every
cross-attention; its states are those of its chunks one after the other.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rite_diffusion.backbones.chunks import Chunk
from rite_diffusion.backbones.learned_embeddings import (
    Filling,
    Vectors,
    spliced,
    split_at,
    vectors_in,
)
from rite_diffusion.backbones.ordered import rows_of
from rite_diffusion.backbones.prompt_syntax import Section
from rite_diffusion.backbones.protocols import LearnedEmbedding

Prompt = Sequence[Section]
Chunked = Callable[[Any, Prompt, Vectors], list[Chunk]]  # by a tokenizer


class Expansion:
    """Prompts as they are encoded: chunks, all in one batch of N.

    Shorter prompts get empty chunks, so that all have as many. Equal prompts with learned words are
    encoded once; others as they come.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        words: Mapping[str, LearnedEmbedding],
        layers: int,
        tokenizers: Sequence[Any],
        length: int,
        chunked: Chunked,
    ):
        self.vectors = vectors_in((text for prompt in prompts for text in _texts(prompt)), words)
        self.tokenizers = tokenizers
        self.length = length  # of an encoding, marks included
        self.layers = list[int]()  # N, the cross-attention that each encoding is for
        self.chunks: list[list[Chunk]] = [[] for _ in tokenizers]  # N for each tokenizer
        keys = [_key(prompt) for prompt in prompts]
        distinct = dict(zip(keys, prompts, strict=True))
        tables = [
            {key: chunked(each, prompt, self.vectors) for key, prompt in distinct.items()}
            for each in tokenizers
        ]
        self._count = max(len(found) for table in tables for found in table.values())
        deep = {word for word, rows in self.vectors.items() if len(rows[0]) > 1}

        def added(key: tuple) -> Tensor:
            says_deep = any(len(split_at(text, deep)) > 1 for text in _texts(distinct[key]))
            return self._add([table[key] for table in tables], layers if says_deep else 1)

        if self.vectors:
            once = {key: added(key) for key in distinct}
            places = [once[key] for key in keys]
        else:
            places = [added(key) for key in keys]
        depth = max(map(len, places))
        self._rows = torch.stack([each.expand(depth, -1) for each in places])  # (B, depth, count)

    def _add(self, chunks: list[list[Chunk]], depth: int) -> Tensor:
        """Take in a prompt's chunks, by tokenizer; their places (depth, count) among the N."""
        start = len(self.layers)
        self.layers += [layer for layer in range(depth) for _ in range(self._count)]
        for into, own in zip(self.chunks, chunks, strict=True):
            into += [*own, *[Chunk()] * (self._count - len(own))] * depth
        return torch.arange(start, len(self.layers)).view(depth, self._count)

    @property
    def encoded_length(self) -> int:
        """Number of tokens in each prompt's states."""
        return self._count * self.length

    def gathered(self, states: Tensor) -> Tensor:
        """States (N, length, width) as the prompts' (B, tokens, width), layer-wise (B, L, …)."""
        return self._taken(states, self._rows).flatten(2, 3).squeeze(1)

    def gathered_pooled(self, pooled: Tensor) -> Tensor:
        """One (B, width) of pooled states (N, width): of the first chunk, the mean over layers."""
        first = self._taken(pooled, self._rows[:, :, 0])
        return first.squeeze(1) if first.shape[1] == 1 else first.mean(1)

    def _taken(self, values: Tensor, rows: Tensor) -> Tensor:
        """Rows of values (N, …) as (*rows.shape, …)."""
        places = rows.flatten().tolist()
        taken = values if places == list(range(len(values))) else rows_of(values, places)
        return taken.unflatten(0, rows.shape)

    def token_ids(self, number: int) -> Tensor:
        """Tokens (N, length) for text encoder `number`, padded."""
        tokenizer, rows = self.tokenizers[number], list[list[int]]()
        for chunk in self.chunks[number]:
            row = [tokenizer.bos_token_id, *chunk.ids, tokenizer.eos_token_id]
            rows.append(row + [tokenizer.pad_token_id] * (self.length - len(row)))
        return torch.tensor(rows)

    def encode(self, encoder: Any, number: int, **options: Any) -> Any:
        """What text encoder `number` says of all that is encoded, learned vectors in place."""
        table = encoder.get_input_embeddings()
        with spliced(table, self._fillings(number)):
            return encoder(self.token_ids(number).to(table.weight.device), **options)

    def _fillings(self, number: int) -> list[Filling]:
        """What goes where, word by word."""
        fillings = []
        for word, rows in self.vectors.items():
            own = [
                (row, slot)
                for row, chunk in enumerate(self.chunks[number])
                for slot in chunk.slots
                if slot.word == word
            ]
            vectors = rows[number]
            layers = [min(self.layers[row], len(vectors) - 1) for row, _ in own]
            numbers = [slot.number for _, slot in own]
            places = [len(vectors[0]) * a + b for a, b in zip(layers, numbers, strict=True)]
            values = rows_of(vectors.flatten(0, 1), places)
            fillings.append(Filling([row for row, _ in own], [s.position for _, s in own], values))
        return fillings

    def weighted(self, states: Tensor, number: int) -> Tensor:
        """States (N, length, width) times their tokens' weights, each chunk's mean as before.

        That is what A1111 calls the original emphasis. Marks and padding weigh 1.
        """
        chunks = self.chunks[number]
        if all(weight == 1 for chunk in chunks for weight in chunk.weights):
            return states
        weights = torch.ones(len(chunks), self.length, 1, device=states.device)
        for row, chunk in enumerate(chunks):
            weights[row, 1 : 1 + len(chunk.weights), 0] = torch.tensor(chunk.weights)
        scaled = states.float() * weights
        ratio = states.float().mean((1, 2), keepdim=True) / scaled.mean((1, 2), keepdim=True)
        return (scaled * ratio).to(states.dtype)


def _texts(prompt: Prompt) -> list[str]:
    return [passage.text for section in prompt for passage in section]


def _key(prompt: Prompt) -> tuple[tuple, ...]:
    return tuple(tuple(section) for section in prompt)
