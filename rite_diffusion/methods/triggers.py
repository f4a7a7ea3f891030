"""Triggers: checks against the base's vocabulary and each other, and keeping them in captions."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

from rite_diffusion.backbones.learned_embeddings import split_at
from rite_diffusion.backbones.prompt_syntax import read_prompt
from rite_diffusion.backbones.protocols import Backbone
from rite_diffusion.errors import ConfigError
from rite_diffusion.photos.folder import PhotoFolder
from rite_diffusion.types import Concept


def contains_word(text: str, trigger: str) -> bool:
    """Whether a text contains a trigger as a whole word, in upper or lower case."""
    return len(split_at(text, {trigger: None})) > 1


def check_triggers(backbone: Backbone, concepts: Sequence[Concept]) -> None:
    """ConfigError for a trigger of known words only, and for two with the same tokens."""
    for concept in concepts:
        if all(backbone.is_known_word(word) for word in concept.trigger.split()):
            raise ConfigError(
                f"trigger '{concept.trigger}' is a word that {backbone.name} already knows, and "
                "training would overwrite it: use a new word such as "
                f"'<{'-'.join(concept.trigger.split())}>'."
            )
    for one, other in combinations(concepts, 2):
        tokens = sorted((backbone.token_ids(each.trigger) for each in (one, other)), key=len)
        if not _contains(tokens[1], tokens[0]):
            continue
        if one.trigger == other.trigger:
            nouns = f"{one.class_noun} and {other.class_noun}"
            raise ConfigError(f"{one.trigger} stands for {nouns}: give each a trigger of its own.")
        how = "are the same tokens" if tokens[0] == tokens[1] else "are one inside the other"
        raise ConfigError(
            f"{one.trigger} and {other.trigger} {how} to {backbone.name}, and would train into "
            "each other: use triggers that differ in more than upper and lower case."
        )


def check_prompts(prompts: Sequence[str], triggers: Sequence[str]) -> None:
    """ConfigError for a preview prompt of unsupported syntax, with any trigger filled in."""
    for prompt in prompts:
        for trigger in triggers:
            read_prompt(prompt.replace("{trigger}", trigger), triggers)


def captions_without_trigger(folder: PhotoFolder, triggers: Sequence[str]) -> list[str]:
    """Captions without any of the triggers."""
    captions = [photo.caption for photo in folder.photos]
    return [text for text in captions if not any(contains_word(text, each) for each in triggers)]


def with_triggers_kept(
    backbone: Backbone, folders: Sequence[PhotoFolder], triggers: Sequence[str]
) -> tuple[list[PhotoFolder], list[tuple[str, str]]]:
    """The folders with triggers kept in all captions, and the captions that were changed.

    Those come with their triggers that the base's limit of tokens would have cut off.
    """
    moved: dict[str, str] = {}
    result = []
    for folder in folders:
        photos = []
        for photo in folder.photos:
            caption, trigger = with_trigger_kept(backbone, photo.caption, triggers)
            if trigger:
                moved[photo.caption] = trigger
            photos.append(replace(photo, caption=caption))
        result.append(replace(folder, photos=photos))
    return result, list(moved.items())


def with_trigger_kept(
    backbone: Backbone, caption: str, triggers: Sequence[str]
) -> tuple[str, str | None]:
    """The caption with its triggers within the base's limit of tokens, and those that were not.

    The latter are moved to the end; None where there are none.
    """
    budget, words = backbone.token_budget, caption.split()
    wanted = [each for each in triggers if contains_word(caption, each)]
    if not wanted or backbone.token_count(caption) <= budget:
        return caption, None
    lost, kept = list[str](), _within(backbone, words, "", budget)
    while missing := [
        each for each in wanted if each not in lost and not contains_word(kept, each)
    ]:
        lost += missing
        kept = _within(backbone, words, " ".join(lost), budget)
    return (kept, ", ".join(lost)) if lost else (caption, None)


def _within(backbone: Backbone, words: list[str], end: str, budget: int) -> str:
    """As many of the words as fit into the token budget, with `end` after them."""
    for count in range(len(words), 0, -1):
        text = " ".join([*words[:count], end]).rstrip()
        if backbone.token_count(text) <= budget:
            return text
    return end


def _contains(tokens: list[int], wanted: list[int]) -> bool:
    places = range(len(tokens) - len(wanted) + 1)
    return any(tokens[place : place + len(wanted)] == wanted for place in places)
