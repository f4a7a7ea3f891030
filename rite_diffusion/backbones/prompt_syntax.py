r"""Prompts as users write them, with the syntax of A1111's web interface.

    (word:1.3)   the word's text states times 1.3        BREAK        begins a new chunk
    (word)       times 1.1                               \( \) \[ \]  brackets as text
    [word]       divided by 1.1                          nested ones multiply

As in A1111, an unclosed bracket reaches to the prompt's end, and an unopened one is text. Syntax of
other tools that is not supported is refused, not read as words.
"""

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from rite_diffusion.backbones.learned_embeddings import check_text, split_at
from rite_diffusion.errors import ConfigError

ROUND, SQUARE = 1.1, 1 / 1.1  # weights of a pair of brackets
BREAK = re.compile(r"\s*\bBREAK\b\s*")

_MARK = re.compile(
    r"(?P<escaped>\\[()\[\]\\])"
    r"|:\s*(?P<weight>[+-]?[.\d]+)\s*(?=\))"
    r"|(?P<bracket>[()\[\]])"
)
_NETWORK = re.compile(r"<(lora|lyco|hypernet):([^:>]+)(?::([^:>]+))?[^>]*>", re.IGNORECASE)
_EMBEDDING = re.compile(r"(?<![\w<])embedding:([^\s,()\[\]:]+)")
_SCHEDULED = re.compile(r":\s*[+-]?(\d+\.?\d*|\.\d+)\s*$")


@dataclass(frozen=True)
class Passage:
    """A part of a prompt and the weight of its text states."""

    text: str
    weight: float = 1.0


Section = list[Passage]  # the text between two BREAKs


def as_written(text: str) -> list[Section]:
    """A caption as a single passage, without prompt syntax."""
    return [[Passage(text)]]


def read_prompt(prompt: str, literal: Collection[str] = ()) -> list[Section]:
    """The prompt's passages, section by section; syntax within `literal` words is text.

    ConfigError for syntax that is not supported and for invalid Unicode.
    """
    check_text(prompt)
    parts = split_at(prompt, literal)
    _refuse_foreign(prompt, parts)
    reader = _Reader(prompt)
    for part in parts:
        if isinstance(part, str):
            reader.read(part)
        else:
            reader.add(part[0])
    return reader.sections()


class _Reader:
    """The state of reading a prompt: passages so far, and where open brackets began."""

    def __init__(self, prompt: str):
        self.prompt = prompt
        self.passages: list[Passage | None] = []  # None: a BREAK
        self.open: dict[str, list[int]] = {"(": [], "[": []}
        self.weight: str | None = None  # explicit weight of the bracket that closes next

    def add(self, text: str) -> None:
        if text:
            self.passages.append(Passage(text))

    def read(self, text: str) -> None:
        start = 0
        for mark in _MARK.finditer(text):
            self._plain(text[start : mark.start()])
            start = mark.end()
            if mark["escaped"]:
                self.add(mark["escaped"][1:])
            elif mark["weight"] is not None:
                if self.open["("]:
                    self.weight = mark["weight"]
                else:
                    self.add(mark[0])
            else:
                self._bracket(mark[0])
        self._plain(text[start:])

    def _plain(self, text: str) -> None:
        for number, part in enumerate(BREAK.split(text)):
            if number:
                self.passages.append(None)
            self.add(part)

    def _bracket(self, bracket: str) -> None:
        if bracket in self.open:
            self.open[bracket].append(len(self.passages))
            return
        opened = self.open["(" if bracket == ")" else "["]
        if not opened:
            self.add(bracket)
            return
        usual = ROUND if bracket == ")" else SQUARE
        self._multiply(opened.pop(), usual if self.weight is None else self._number(self.weight))
        self.weight = None

    def _number(self, text: str) -> float:
        try:
            return float(text)
        except ValueError:
            raise ConfigError(
                f"prompt '{self.prompt}': the weight '{text}' is not a number; write (word:1.3)."
            ) from None

    def _multiply(self, start: int, factor: float) -> None:
        self.passages[start:] = [
            each and replace(each, weight=each.weight * factor) for each in self.passages[start:]
        ]

    def sections(self) -> list[Section]:
        """The passages by section; neighbours of equal weight are joined."""
        for start in self.open["("]:
            self._multiply(start, ROUND)
        for start in self.open["["]:
            self._multiply(start, SQUARE)
        sections: list[Section] = [[]]
        for each in self.passages:
            last = sections[-1]
            if each is None:
                sections.append([])
            elif last and last[-1].weight == each.weight:
                last[-1] = replace(each, text=last[-1].text + each.text)
            else:
                last.append(each)
        return sections


def is_blank(sections: Iterable[Section]) -> bool:
    """Whether a prompt has no text."""
    return not any(passage.text for section in sections for passage in section)


# --- what is refused ---------------------------------------------------------------------------


def _refuse_foreign(prompt: str, parts: Sequence[str | re.Match[str]]) -> None:
    """ConfigError for other tools' syntax outside escaped brackets and literal words."""
    bare = "".join(part if isinstance(part, str) else "_" * len(part[0]) for part in parts)
    bare = re.sub(r"\\.", "__", bare)
    if found := _NETWORK.search(bare):
        name, weight = found[2].strip(), found[3] or "1"
        raise ConfigError(
            f"prompt '{prompt}': {found[0]} is not read from the prompt; take it out and pass "
            f"--adapter {name}.safetensors:{weight.strip()} (adapters=[…] in Python)."
        )
    if found := _EMBEDDING.search(bare):
        raise ConfigError(
            f"prompt '{prompt}': {found[0]} is not read from the prompt; pass --adapter "
            f"{found[1]}.safetensors and write the embedding's word."
        )
    if re.search(r"\bAND\b", bare):
        raise ConfigError(
            f"prompt '{prompt}': AND between prompts is not supported; write 'and', or give each "
            "part a --region."
        )
    if changing := _changing(bare):
        raise ConfigError(
            f"prompt '{prompt}': [{changing}] would change the prompt while it is drawn, which is "
            r"not supported; write one of its words, or \[ and \] for brackets that are text."
        )


def _changing(text: str) -> str:
    """The content of a text's first [from:to:when] or [one|other]; "" where there is none."""
    levels: list[tuple[str, int, str]] = []  # bracket, start of its content, text outside it
    own = ""
    for place, letter in enumerate(text):
        if letter in "([":
            levels.append((letter, place + 1, own))
            own = ""
        elif letter in ")]" and levels and levels[-1][0] == "(["[letter == "]"]:
            bracket, start, outer = levels.pop()
            if bracket == "[" and ("|" in own or _SCHEDULED.search(own)):
                return text[start:place]
            own = outer + "_"
        else:
            own += letter
    return ""
