"""Words in captions: those that describe the concept itself, and those that all captions share.

By lists of English words and the order of words; nothing is parsed.
"""

import re
from collections.abc import Sequence

from rite_diffusion.types import Concept, Photo

COLOURS = frozenset(
    "red orange yellow green blue purple pink brown black white grey gray beige tan golden gold "
    "silver cream ginger blonde blond dark light pale bright "
    "colorful colourful multicolored".split()
)
LOOKS = COLOURS | frozenset(
    "striped spotted fluffy furry hairy shaggy short-haired long-haired curly smooth shiny glossy "
    "metallic wooden plastic ceramic glass leather round square rectangular oval slim thin thick "
    "old young adult elderly cute adorable beautiful pretty handsome tabby curved pointed pointy "
    "floppy bushy chubby tall bearded bald freckled wrinkled smiling-faced cartoon".split()
)
# Words about how the picture was taken that may stand before the concept.
FRAMING = frozenset(
    "small tiny large big huge single one two three close-up closeup full whole blurry".split()
)
PARTS = frozenset(
    "fur hair coat ears ear eyes eye tail nose face paws paw legs leg snout muzzle whiskers beak "
    "feathers wings wing mane horn horns skin beard body head antenna antennas wheels wheel handle "
    "lid strap straps zipper pocket pockets label logo frosting sprinkles".split()
)
# Words that any caption may have: grammar, framing, and names of surroundings.
COMMON = FRAMING | frozenset(
    "a an the of on in at to by with and or is are was it its this that his her their from for as "
    "near behind front beside above below under over next into onto up down left right side middle "
    "center centre top bottom background backdrop foreground photo photograph picture image shot "
    "portrait drawing painting illustration rendering style view scene close looking standing "
    "sitting lying".split()
)
_WORD = re.compile(r"[^\W_]+(?:[-'][^\W_]+)*")
_SLOT = "\x00"  # stands for the trigger


def concept_words(caption: str, concept: Concept) -> list[str]:
    """The parts of a caption that describe the concept: looks before its name, parts of its body.

    "a fluffy brown <rex> dog with floppy ears on a red rug" gives "fluffy brown", "floppy ears".
    Looks count directly before the trigger or the class noun, and before a part of the body; so
    "one eye and one ear", which says what is seen, gives nothing.
    """
    found = []
    words = _words(caption, concept)
    names = {_SLOT, *concept.class_noun.casefold().split()[-1:]}
    for place, word in enumerate(words):
        if word not in names and word not in PARTS:
            continue
        looks = _looks_before(words, place)
        if looks:
            found.append(" ".join(looks if word in names else [*looks, word]))
    return found


def _looks_before(words: Sequence[str], place: int) -> list[str]:
    """The words of looks directly before a place; words of framing among them are passed over."""
    found = list[str]()
    for word in reversed(words[:place]):
        if word not in LOOKS and word not in FRAMING:
            break
        if word in LOOKS:
            found.insert(0, word)
    return found


def same_captions(photos: Sequence[Photo]) -> list[list[str]]:
    """Names of photos with one caption, where it is that of half of them, and of two at least."""
    groups: dict[str, list[str]] = {}
    for photo in photos:
        groups.setdefault(" ".join(photo.caption.casefold().split()), []).append(photo.path.name)
    return [names for names in groups.values() if len(names) >= max(2, len(photos) / 2)]


def shared_words(photos: Sequence[Photo], concept: Concept) -> list[str]:
    """The words that all captions have besides the concept's names and words of any caption."""
    every = [_words(photo.caption, concept) for photo in photos]
    own = {_SLOT, *concept.class_noun.casefold().split()}
    return [
        word
        for word in dict.fromkeys(every[0])
        if word not in COMMON and word not in own and all(word in words for words in every)
    ]


def _words(caption: str, concept: Concept) -> list[str]:
    """The caption's words in lower case; the trigger is one of them, `_SLOT`."""
    pieces = re.split(re.escape(concept.trigger), caption, flags=re.IGNORECASE)
    words = [_WORD.findall(piece.casefold()) for piece in pieces]
    return [word for place, some in enumerate(words) for word in ([_SLOT] if place else []) + some]
