"""Prompts with learned words: ordinary tokens hold their places, a hook puts their vectors there.

The tables of the text encoders stay as they are. A word may have vectors of its own for every
cross-attention ("layer-wise", Voynov et al. 2023, "P+"); a prompt that says one is encoded once for
each, all in one batch, and its states are (layers, tokens, width).
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rite_diffusion.backbones.ordered import rows_of
from rite_diffusion.backbones.protocols import Word

PLACEHOLDER = "*"  # its token stands where a vector will be

Vectors = Mapping[str, Sequence[Tensor]]  # word -> per text encoder (layers, vectors, width)


@dataclass(frozen=True)
class Slot:
    """Where a vector of a learned word stands among a prompt's tokens, the begin mark counted."""

    position: int
    word: str
    number: int  # which of the word's vectors


def spoken(prompt: str, words: Mapping[str, Any]) -> list[str | re.Match[str]]:
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


def said(prompts: Sequence[str], words: Mapping[str, Word]) -> Vectors:
    """The vectors of those learned words that some prompt says."""
    found = [part[0] for p in prompts for part in spoken(p, words) if isinstance(part, re.Match)]
    names = {word.lower(): word for word in words}
    return {name: words[name].rows() for name in dict.fromkeys(names[f.lower()] for f in found)}


def ids_of(tokenizer: Any, text: str) -> list[int]:
    """The text's tokens without begin and end marks."""
    return tokenizer(text, add_special_tokens=False, truncation=False).input_ids


def tokens_of(tokenizer: Any, prompt: str, vectors: Vectors) -> tuple[list[int], list[Slot]]:
    """All tokens of a prompt without marks, and where the vectors of learned words belong."""
    [placeholder] = ids_of(tokenizer, PLACEHOLDER)
    names = {word.lower(): word for word in vectors}
    ids, slots = list[int](), list[Slot]()
    for part in spoken(prompt, vectors):
        if isinstance(part, str):
            ids += ids_of(tokenizer, part) if part.strip() else []
            continue
        word = names[part[0].lower()]
        count = vectors[word][0].shape[1]
        slots += [Slot(1 + len(ids) + number, word, number) for number in range(count)]
        ids += [placeholder] * count
    return ids, slots


def positions_of(tokenizer: Any, prompt: str, word: str, words: Mapping[str, Word]) -> list[int]:
    """Where the tokens of a word's first mention stand in the encoded prompt; [] for nowhere."""
    ids, slots = tokens_of(tokenizer, prompt, said([prompt], words))
    limit = tokenizer.model_max_length - 1
    if word in words:
        count = words[word].rows()[0].shape[1]
        found = [slot.position for slot in slots if slot.word == word][:count]
    else:
        wanted = ids_of(tokenizer, word)
        starts = (i for i in range(len(ids)) if ids[i : i + len(wanted)] == wanted)
        found = [range(1 + i, 1 + i + len(wanted)) for i in starts]
        found = list(found[0]) if found else []
    return [position for position in found if position < limit]


class Expansion:
    """Prompts as they are encoded: equal ones once, and layer-wise ones for each cross-attention.

    Prompts without learned words are encoded as they come.
    """

    def __init__(self, prompts: list[str], words: Mapping[str, Word], layers: int):
        self.vectors = said(prompts, words)
        self.texts = list[str]()  # N, of all that is encoded
        self.layers = list[int]()  # the cross-attention that each is for
        self._rows: list[list[int]] = []  # of the B prompts, one or for each layer, into the N
        if not self.vectors:
            self.texts, self.layers = prompts, [0] * len(prompts)
            return
        deep = {word: rows for word, rows in self.vectors.items() if len(rows[0]) > 1}
        places: dict[str, list[int]] = {}
        for prompt in dict.fromkeys(prompts):
            count = layers if len(spoken(prompt, deep)) > 1 else 1
            places[prompt] = list(range(len(self.texts), len(self.texts) + count))
            self.texts += [prompt] * count
            self.layers += range(count)
        depth = max(map(len, places.values()))
        own = [places[prompt] for prompt in prompts]
        self._rows = [row * (depth // len(row)) for row in own]

    def gathered(self, values: Tensor) -> Tensor:
        """Values (N, …) of all that was encoded as the prompts' (B, …), layer-wise (B, L, …)."""
        if not self._rows:
            return values
        rows = rows_of(values, [place for row in self._rows for place in row])
        return rows.unflatten(0, (len(self._rows), -1)).squeeze(1)

    def token_ids(self, tokenizer: Any) -> tuple[Tensor, list[list[Slot]]]:
        """Tokens (N, length) of all that is encoded, padded or cut, and the slots of each."""
        if not self.vectors:
            return padded_ids(tokenizer, self.texts), []
        length = tokenizer.model_max_length
        distinct = dict.fromkeys(self.texts)
        tokens = {text: tokens_of(tokenizer, text, self.vectors) for text in distinct}
        ids, slots = list[list[int]](), list[list[Slot]]()
        for text in self.texts:
            inner, own = tokens[text]
            row = [tokenizer.bos_token_id, *inner[: length - 2], tokenizer.eos_token_id]
            ids.append(row + [tokenizer.pad_token_id] * (length - len(row)))
            slots.append([slot for slot in own if slot.position < length - 1])
        return torch.tensor(ids), slots

    def encode(self, encoder: Any, tokenizer: Any, number: int, **options: Any) -> Any:
        """What text encoder `number` says of all that is encoded, learned vectors in place."""
        ids, slots = self.token_ids(tokenizer)
        table = encoder.get_input_embeddings()
        with _spliced(table, self._fillings(slots, number)):
            return encoder(ids.to(table.weight.device), **options)

    def _fillings(self, slots: list[list[Slot]], number: int) -> list["Filling"]:
        """What goes where, word by word."""
        fillings = []
        for word, rows in self.vectors.items():
            own = [(i, slot) for i, each in enumerate(slots) for slot in each if slot.word == word]
            vectors = rows[number]
            layers = [min(self.layers[i], len(vectors) - 1) for i, _ in own]
            numbers = [slot.number for _, slot in own]
            places = [len(vectors[0]) * a + b for a, b in zip(layers, numbers, strict=True)]
            values = rows_of(vectors.flatten(0, 1), places)
            fillings.append(Filling([i for i, _ in own], [s.position for _, s in own], values))
        return fillings


@dataclass(frozen=True)
class Filling:
    """Vectors (n, width) for n places in a batch of prompts' embeddings."""

    rows: list[int]
    positions: list[int]
    values: Tensor


@contextmanager
def _spliced(table: nn.Module, fillings: list[Filling]) -> Iterator[None]:
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


def padded_ids(tokenizer: Any, prompts: list[str]) -> Tensor:
    """The prompts' tokens (B, length), padded or cut to the tokenizer's length."""
    return tokenizer(
        prompts,
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids
