"""Learned embeddings in prompts: placeholder tokens, whose embeddings a hook replaces by vectors.

The text encoders' embedding tables do not change. An embedding may have other vectors for every
cross-attention ("layer-wise", Voynov et al. 2023, "P+"); a prompt with one is encoded once for each
cross-attention, all in one batch, and its states are (layers, tokens, width).
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rite_diffusion.backbones.protocols import LearnedEmbedding
from rite_diffusion.errors import ConfigError

PLACEHOLDER = "*"  # its token marks the position of a vector

Vectors = Mapping[str, Sequence[Tensor]]  # word -> per text encoder (layers, vectors, width)


@dataclass(frozen=True)
class Slot:
    """The position of a learned vector among a prompt's tokens, the begin mark included."""

    position: int
    word: str
    number: int  # index of the vector among the word's


def split_at(prompt: str, words: Collection[str]) -> list[str | re.Match[str]]:
    """The prompt split at the words that it contains: text as str, words as matches, in order.

    Case is ignored, as in CLIP's tokenizer; of words with the same beginning the longest matches. A
    word that begins or ends with a letter or digit does not match inside a longer word.
    """
    if not words:
        return [prompt]
    longest_first = sorted(words, key=len, reverse=True)
    pattern = re.compile("|".join(_alone(word) for word in longest_first), re.IGNORECASE)
    parts, start = list[str | re.Match[str]](), 0
    for found in pattern.finditer(prompt):
        parts += [prompt[start : found.start()], found]
        start = found.end()
    return [*parts, prompt[start:]]


def _alone(word: str) -> str:
    before = r"(?<!\w)" if word[0].isalnum() else ""
    after = r"(?!\w)" if word[-1].isalnum() else ""
    return f"{before}{re.escape(word)}{after}"


def vectors_in(prompts: Iterable[str], words: Mapping[str, LearnedEmbedding]) -> Vectors:
    """The vectors of the words that occur in the prompts."""
    found = [part[0] for p in prompts for part in split_at(p, words) if isinstance(part, re.Match)]
    names = {word.lower(): word for word in words}
    return {name: words[name].rows() for name in dict.fromkeys(names[f.lower()] for f in found)}


def check_text(text: str) -> None:
    """ConfigError where a text is not valid Unicode, as command-line arguments may be."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{text!r} is not UTF-8 text: write it again.") from None


def ids_of(tokenizer: Any, text: str) -> list[int]:
    """The text's tokens without begin and end marks; ConfigError for invalid Unicode."""
    check_text(text)
    return tokenizer(text, add_special_tokens=False, truncation=False).input_ids


def tokens_of(tokenizer: Any, prompt: str, vectors: Vectors) -> tuple[list[int], list[Slot]]:
    """All tokens of a prompt without marks, and the positions of learned vectors."""
    [placeholder] = ids_of(tokenizer, PLACEHOLDER)
    names = {word.lower(): word for word in vectors}
    ids, slots = list[int](), list[Slot]()
    for part in split_at(prompt, vectors):
        if isinstance(part, str):
            ids += ids_of(tokenizer, part) if part.strip() else []
            continue
        word = names[part[0].lower()]
        count = vectors[word][0].shape[1]
        slots += [Slot(1 + len(ids) + number, word, number) for number in range(count)]
        ids += [placeholder] * count
    return ids, slots


def positions_of(
    tokenizer: Any, caption: str, word: str, words: Mapping[str, LearnedEmbedding], size: int
) -> list[int]:
    """Positions of a word's tokens in a caption's encoding, at its first mention; [] for none.

    The encoding has `size` tokens and two marks.
    """
    ids, slots = tokens_of(tokenizer, caption, vectors_in([caption], words))
    if word in words:
        count = words[word].rows()[0].shape[1]
        found = [slot.position for slot in slots if slot.word == word][:count]
    else:
        wanted = ids_of(tokenizer, word)
        starts = (i for i in range(len(ids)) if ids[i : i + len(wanted)] == wanted)
        found = [range(1 + i, 1 + i + len(wanted)) for i in starts]
        found = list(found[0]) if found else []
    return [position for position in found if position <= size]


@dataclass(frozen=True)
class Insertion:
    """Vectors (n, width) for n positions in a batch of token embeddings."""

    rows: list[int]
    positions: list[int]
    values: Tensor


@contextmanager
def inserted(table: nn.Module, insertions: list[Insertion]) -> Iterator[None]:
    """Within the block, the embedding table's output has the insertions' vectors."""

    def insert(module: nn.Module, arguments: tuple, output: Tensor) -> Tensor:
        for each in insertions:
            places = torch.tensor([each.rows, each.positions], dtype=torch.long)
            output = output.index_put(tuple(places.to(output.device)), each.values.to(output))
        return output

    handle = table.register_forward_hook(insert) if insertions else None
    try:
        yield
    finally:
        if handle:
            handle.remove()
