"""Prompts with learned words: ordinary tokens hold their places, a hook puts their vectors there.

The tables of the text encoders stay as they are. A word may have vectors of its own for every
cross-attention ("layer-wise", Voynov et al. 2023, "P+"); a prompt that says one is encoded once for
each, all in one batch, and its states are (layers, tokens, width).
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

PLACEHOLDER = "*"  # its token stands where a vector will be

Vectors = Mapping[str, Sequence[Tensor]]  # word -> per text encoder (layers, vectors, width)


@dataclass(frozen=True)
class Slot:
    """Where a vector of a learned word stands among a prompt's tokens, the begin mark counted."""

    position: int
    word: str
    number: int  # which of the word's vectors


def split_at(prompt: str, words: Collection[str]) -> list[str | re.Match[str]]:
    """The prompt's ordinary text and, in their places, the learned words that it says.

    Upper and lower case are one, as in CLIP's tokenizer; of words that begin alike the longest
    counts. A word of letters is found only where it stands alone.
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
    """The vectors of those learned words that some prompt says."""
    found = [part[0] for p in prompts for part in split_at(p, words) if isinstance(part, re.Match)]
    names = {word.lower(): word for word in words}
    return {name: words[name].rows() for name in dict.fromkeys(names[f.lower()] for f in found)}


def check_text(text: str) -> None:
    """ConfigError where a text holds bytes that were no characters, as arguments may."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{text!r} is no text in UTF-8: write it anew.") from None


def ids_of(tokenizer: Any, text: str) -> list[int]:
    """The text's tokens without begin and end marks; ConfigError for what is no text."""
    check_text(text)
    return tokenizer(text, add_special_tokens=False, truncation=False).input_ids


def tokens_of(tokenizer: Any, prompt: str, vectors: Vectors) -> tuple[list[int], list[Slot]]:
    """All tokens of a prompt without marks, and where the vectors of learned words belong."""
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
    """Where the tokens of a word's first mention stand in a caption's encoding; [] for nowhere.

    An encoding holds `size` tokens beside its marks.
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
class Filling:
    """Vectors (n, width) for n places in a batch of prompts' embeddings."""

    rows: list[int]
    positions: list[int]
    values: Tensor


@contextmanager
def spliced(table: nn.Module, fillings: list[Filling]) -> Iterator[None]:
    """The embedding table gives the fillings in their places, until the block ends."""

    def fill(module: nn.Module, arguments: tuple, output: Tensor) -> Tensor:
        for each in fillings:
            places = torch.tensor([each.rows, each.positions], dtype=torch.long)
            output = output.index_put(tuple(places.to(output.device)), each.values.to(output))
        return output

    handle = table.register_forward_hook(fill) if fillings else None
    try:
        yield
    finally:
        if handle:
            handle.remove()
