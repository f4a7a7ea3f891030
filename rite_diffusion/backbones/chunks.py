"""Prompts of any length, divided into chunks of the text encoder's length.

As in A1111's web interface: a chunk has as many tokens as the encoder has positions, without begin
and end marks; it ends earlier at a comma near its end, and at BREAK. Protected words (learned
embeddings and adapters' triggers) are not divided.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from rite_diffusion.backbones.learned_embeddings import (
    PLACEHOLDER,
    Slot,
    Vectors,
    check_text,
    ids_of,
    split_at,
    tokens_of,
)
from rite_diffusion.backbones.prompt_syntax import Section

COMMA_REACH = 20 / 75  # share of a chunk, from its end, in which a comma ends it early


@dataclass(frozen=True)
class Chunk:
    """Tokens without marks, a weight for each, and the positions of learned vectors."""

    ids: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    slots: list[Slot] = field(default_factory=list)


@dataclass(frozen=True)
class Unit:
    """Tokens that stay in one chunk: a single token, or those of a protected word."""

    ids: list[int]
    weight: float
    word: str = ""  # of a learned embedding, whose vectors replace these tokens
    first: int = 0  # index of the first of these vectors


def cut_caption(
    tokenizer: Any, sections: Sequence[Section], vectors: Vectors, size: int
) -> list[Chunk]:
    """A single chunk: the caption's first `size` tokens."""
    [[passage]] = sections
    ids, slots = tokens_of(tokenizer, passage.text, vectors)
    kept = [slot for slot in slots if slot.position <= size]
    return [Chunk(ids[:size], [1.0] * len(ids[:size]), kept)]


def chunks_of(
    tokenizer: Any, sections: Sequence[Section], vectors: Vectors, size: int, whole: Collection[str]
) -> list[Chunk]:
    """A prompt's chunks of up to `size` tokens, at least one; `whole` words are not divided."""
    comma = ids_of(tokenizer, ",")
    chunks = []
    for section in sections:
        units = [
            unit
            for passage in section
            for unit in _units(tokenizer, passage.text, passage.weight, vectors, whole)
        ]
        chunks += [_laid_out(part) for part in _split(units, size, comma)] or [Chunk()]
    return chunks[:-1] if len(chunks) > 1 and not chunks[-1].ids else chunks


def _units(
    tokenizer: Any, text: str, weight: float, vectors: Vectors, whole: Collection[str]
) -> list[Unit]:
    [placeholder] = ids_of(tokenizer, PLACEHOLDER)
    names = {word.lower(): word for word in vectors}
    units = []
    for part in split_at(text, vectors):
        if isinstance(part, re.Match):
            word = names[part[0].lower()]
            units.append(Unit([placeholder] * vectors[word][0].shape[1], weight, word))
        elif part.strip():
            units += [Unit(ids, weight) for ids in _grouped(tokenizer, part, whole)]
    return units


def _grouped(tokenizer: Any, text: str, whole: Collection[str]) -> list[list[int]]:
    """The text's tokens in groups: one each, and all tokens of a whole word together."""
    spans = [part.span() for part in split_at(text, whole) if isinstance(part, re.Match)]
    if not spans:
        return [[each] for each in ids_of(tokenizer, text)]
    check_text(text)
    found = tokenizer(
        text, add_special_tokens=False, truncation=False, return_offsets_mapping=True
    )  # fmt: skip

    def group_of(place: int) -> tuple[int, int]:
        start, end = found.offset_mapping[place]
        inside = (n for n, (first, last) in enumerate(spans) if start < last and end > first)
        number = next(inside, -1)
        return (number, 0) if number >= 0 else (-1, place)

    groups = groupby(range(len(found.input_ids)), key=group_of)
    return [[found.input_ids[place] for place in places] for _, places in groups]


def _split(units: Sequence[Unit], size: int, comma: list[int]) -> list[list[Unit]]:
    chunks: list[list[Unit]] = []
    current: list[Unit] = []
    for unit in _no_longer_than(size, units):
        used = sum(len(each.ids) for each in current)
        if used + len(unit.ids) > size:
            moved = [] if unit.ids == comma else _after_comma(current, size, comma)
            chunks.append(current[: len(current) - len(moved)])
            current = moved
        current.append(unit)
    return [*chunks, current] if current else chunks


def _no_longer_than(size: int, units: Sequence[Unit]) -> list[Unit]:
    """The units; one with more than `size` tokens is divided into single tokens."""
    parts = []
    for unit in units:
        whole = len(unit.ids) <= size
        parts += (
            [unit]
            if whole
            else [
                Unit([each], unit.weight, unit.word, number) for number, each in enumerate(unit.ids)
            ]
        )
    return parts


def _after_comma(chunk: Sequence[Unit], size: int, comma: list[int]) -> list[Unit]:
    """The units after the chunk's last comma, if that is near the end; else none."""
    places = [place for place, unit in enumerate(chunk) if unit.ids == comma and not unit.word]
    if not places:
        return []
    tail = list(chunk[places[-1] + 1 :])
    return tail if sum(len(unit.ids) for unit in tail) < round(COMMA_REACH * size) else []


def _laid_out(units: Sequence[Unit]) -> Chunk:
    chunk = Chunk()
    for unit in units:
        if unit.word:
            chunk.slots.extend(
                Slot(1 + len(chunk.ids) + place, unit.word, unit.first + place)
                for place in range(len(unit.ids))
            )
        chunk.ids.extend(unit.ids)
        chunk.weights.extend([unit.weight] * len(unit.ids))
    return chunk
