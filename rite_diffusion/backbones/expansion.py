"""The encodings that a batch of prompts needs, and the states assembled from them.

A prompt is encoded chunk by chunk, and once for every cross-attention where it contains a
layer-wise embedding. Its states are those of its chunks, concatenated along the tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rite_diffusion.backbones.chunks import Chunk
from rite_diffusion.backbones.learned_embeddings import (
    Insertion,
    Vectors,
    inserted,
    split_at,
    vectors_in,
)
from rite_diffusion.backbones.ordered import rows_of
from rite_diffusion.backbones.prompt_syntax import Section
from rite_diffusion.backbones.protocols import LearnedEmbedding

Prompt = Sequence[Section]
Chunked = Callable[[Any, Prompt, Vectors], list[Chunk]]  # (tokenizer, prompt, vectors) -> chunks


class Expansion:
    """All chunks of a batch of B prompts, as one batch of N encodings.

    Shorter prompts get empty chunks, so that all prompts have the same number. Equal prompts are
    encoded once if the batch contains learned embeddings, else each time.
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
        self.length = length  # tokens of an encoding, marks included
        self.layers = list[int]()  # (N,) the cross-attention that each encoding is for
        self.chunks: list[list[Chunk]] = [[] for _ in tokenizers]  # N chunks for each tokenizer
        keys = [_key(prompt) for prompt in prompts]
        distinct = dict(zip(keys, prompts, strict=True))
        tables = [
            {key: chunked(each, prompt, self.vectors) for key, prompt in distinct.items()}
            for each in tokenizers
        ]
        self._count = max(len(found) for table in tables for found in table.values())
        layer_wise = {word for word, rows in self.vectors.items() if len(rows[0]) > 1}

        def added(key: tuple) -> Tensor:
            deep = any(len(split_at(text, layer_wise)) > 1 for text in _texts(distinct[key]))
            return self._add([table[key] for table in tables], layers if deep else 1)

        if self.vectors:
            once = {key: added(key) for key in distinct}
            places = [once[key] for key in keys]
        else:
            places = [added(key) for key in keys]
        depth = max(map(len, places))
        self._rows = torch.stack([each.expand(depth, -1) for each in places])  # (B, depth, count)

    def _add(self, chunks: list[list[Chunk]], depth: int) -> Tensor:
        """Add a prompt's chunks, by tokenizer; returns their indices (depth, count) among the N."""
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
        """The prompts' states (B, tokens, width), or (B, L, …), from states (N, length, width)."""
        return self._taken(states, self._rows).flatten(2, 3).squeeze(1)

    def gathered_pooled(self, pooled: Tensor) -> Tensor:
        """The prompts' pooled states (B, width): the first chunk's, averaged over layers."""
        first = self._taken(pooled, self._rows[:, :, 0])
        return first.squeeze(1) if first.shape[1] == 1 else first.mean(1)

    def _taken(self, values: Tensor, rows: Tensor) -> Tensor:
        """`values[rows]`: rows of values (N, …) as (*rows.shape, …)."""
        places = rows.flatten().tolist()
        taken = values if places == list(range(len(values))) else rows_of(values, places)
        return taken.unflatten(0, rows.shape)

    def token_ids(self, number: int) -> Tensor:
        """Tokens (N, length) for text encoder `number`, with marks and padding."""
        tokenizer, rows = self.tokenizers[number], list[list[int]]()
        for chunk in self.chunks[number]:
            row = [tokenizer.bos_token_id, *chunk.ids, tokenizer.eos_token_id]
            rows.append(row + [tokenizer.pad_token_id] * (self.length - len(row)))
        return torch.tensor(rows)

    def encode(self, encoder: Any, number: int, **options: Any) -> Any:
        """The output of text encoder `number` for all N encodings, learned vectors inserted."""
        table = encoder.get_input_embeddings()
        with inserted(table, self._insertions(number)):
            return encoder(self.token_ids(number).to(table.weight.device), **options)

    def _insertions(self, number: int) -> list[Insertion]:
        """The vectors to insert and their positions, word by word."""
        insertions = []
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
            positions = [slot.position for _, slot in own]
            insertions.append(Insertion([row for row, _ in own], positions, values))
        return insertions

    def weighted(self, states: Tensor, number: int) -> Tensor:
        """States (N, length, width) times their tokens' weights, scaled to keep each chunk's mean.

        This is A1111's "original" emphasis. Marks and padding have weight 1.
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
