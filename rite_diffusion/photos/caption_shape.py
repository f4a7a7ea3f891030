"""A model's description of a photo as a caption: without what the concept is, in a family's form.

By lists of English words and the order of words, as `caption_words`; nothing is parsed.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from rite_diffusion.backbones.families import CaptionStyle
from rite_diffusion.photos.caption_words import FRAMING, LOOKS, PARTS
from rite_diffusion.types import Concept

ARTICLES = frozenset("a an the this that his her their its my your one".split())
LINKS = frozenset(
    "of on in at to by with from near behind front beside above below under over next into onto "
    "against through between among around and or that which who is are was were has have wearing "
    "holding".split()
)
MOST_LOOKS = 4  # words before the noun that may describe it
_OPENING = re.compile(
    r"^(?:(?:in )?(?:the|this) (?:image|picture|photo|photograph)"
    r"(?: (?:shows|depicts|features|captures|is of)|,)?(?: (?:we can see|there is|there are))?"
    r"|there (?:is|are)|arafed|araffe)\s+",
    re.IGNORECASE,
)
_FRAME = re.compile(
    r"^((?:an? |the )?(?:close[- ]?up )?(?:photo|photograph|picture|image|close[- ]?up|drawing|"
    r"painting|illustration)(?: of)\s+)",
    re.IGNORECASE,
)
_TOKEN = re.compile(r"[^\s,.;:!?]+|[,.;:!?]")
_SENTENCE = re.compile(r"(?<=[.!?])\s+")


@dataclass(frozen=True)
class ShapedCaption:
    """A caption, and whether the description named the concept."""

    text: str
    named: bool  # otherwise the first thing that was named gave way to the trigger


def shape_caption(
    description: str, concept: Concept, style: CaptionStyle, names: Sequence[str] = ()
) -> ShapedCaption:
    """The caption of a description, with the trigger in the place of what the concept is.

    What names the concept gives way with the words of looks before it: the class noun and `names`
    ("puppy"). So do parts of its body ("with floppy ears") and sentences that are about them. What
    it does, where it is and how the picture is taken stays.
    """
    text = _OPENING.sub("", description.strip().strip("\"'").strip())
    sentences = [_words(each) for each in _SENTENCE.split(text) if each.strip()]
    called = {word.casefold() for noun in (concept.class_noun, *names) for word in _forms(noun)}
    replaced = [_with_trigger(words, concept.trigger, called) for words in sentences]
    named = any(concept.trigger in words for words in replaced)
    if not named and style != "tags":
        replaced[:1] = [_in_the_first_place(text, concept.trigger)]
    kept = [words for words in map(_without_parts, replaced) if words]
    if style == "tags":
        return ShapedCaption(", ".join(_tags(kept, concept.trigger)), named)
    lines = [_joined(words) for words in (kept if style == "sentences" else kept[:1])]
    caption = " ".join(lines)
    if concept.trigger not in caption:
        caption = f"{concept.trigger}, {caption}".removesuffix(", ")
    if style == "phrase":
        return ShapedCaption(_lowered(caption.rstrip(".!? ")), named)
    return ShapedCaption(" ".join(_sentence(line) for line in _SENTENCE.split(caption)), named)


def _words(text: str) -> list[str]:
    return _TOKEN.findall(text)


def _forms(noun: str) -> list[str]:
    """The last word of a noun, in singular and plural."""
    last = noun.split()[-1] if noun.split() else noun
    return [last, f"{last}s", f"{last}es"]


def _with_trigger(words: list[str], trigger: str, called: set[str]) -> list[str]:
    """The words with the trigger for each name of the concept and what describes it before it."""
    found = list[str]()
    for word in words:
        if word.casefold() not in called and word != trigger:
            found.append(word)
            continue
        for _ in range(MOST_LOOKS):
            if found and found[-1] != trigger and (_describes(found[-1]) or _joins_looks(found)):
                found.pop()
        if found and found[-1].casefold() == "an":
            found[-1] = "a"
        if not found or found[-1] != trigger:
            found.append(trigger)
    return found


def _describes(word: str) -> bool:
    """Whether a word before a noun belongs to it: no article, link, verb form or mark."""
    low = word.casefold()
    links = ARTICLES | LINKS
    return bool(re.match(r"\w", low)) and low not in links and not low.endswith("ing")


def _joins_looks(words: list[str]) -> bool:
    """Whether words end as "brown and", so that what follows describes the same."""
    return len(words) > 1 and words[-1].casefold() == "and" and words[-2].casefold() in LOOKS


def _in_the_first_place(text: str, trigger: str) -> list[str]:
    """The words of a text's first sentence with the trigger for the first thing that it names."""
    first = _SENTENCE.split(text)[0]
    frame = _FRAME.match(first)
    head = frame[1] if frame else ""
    rest = _words(first[len(head) :])
    article = rest[:1] if rest and rest[0].casefold() in ARTICLES else []
    rest = rest[len(article) :]
    while rest and _describes(rest[0]):
        rest = rest[1:]
    article = ["a" if word.casefold() == "an" else word for word in article]
    return [*_words(head), *article, trigger, *rest]


def _without_parts(words: list[str]) -> list[str]:
    """The words without "with floppy ears"; none of a sentence as "It has floppy ears."."""
    low = [word.casefold() for word in words]
    if PARTS & set(low) and {"has", "have"} & set(low):
        return []
    found, place = list[str](), 0
    while place < len(words):
        end = place + 1
        while end < len(words) and low[end] in LOOKS | FRAMING | PARTS | ARTICLES | {"and", ","}:
            end += 1
        while end > place + 1 and low[end - 1] in {"and", ","} | ARTICLES:
            end -= 1
        if low[place] in ("with", "and") and PARTS & set(low[place:end]):
            place = end
        else:
            found.append(words[place])
            place += 1
    return found


def _tags(sentences: list[list[str]], trigger: str) -> list[str]:
    """The trigger, then the other things and actions, each without articles and links."""
    tags, current = [trigger], list[str]()
    for word in (word for words in sentences for word in [*words, ","]):
        low = word.casefold()
        if low in LINKS or not re.match(r"\w", low) or word == trigger:
            tags.append(" ".join(current).casefold())
            current = []
        elif low not in ARTICLES:
            current.append(word)
    of_concept = LOOKS | FRAMING | PARTS
    kept = [tag for tag in tags if tag and not set(tag.split()) <= of_concept]
    return list(dict.fromkeys([trigger, *kept]))


def _joined(words: list[str]) -> str:
    return re.sub(r"\s+([,.;:!?])", r"\1", " ".join(words))


def _lowered(text: str) -> str:
    return text[:1].lower() + text[1:]


def _sentence(text: str) -> str:
    capital = text[:1].upper() + text[1:]
    return capital if capital.endswith((".", "!", "?")) else f"{capital.rstrip(', ')}."
