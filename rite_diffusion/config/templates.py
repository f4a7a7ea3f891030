"""Templates of captions and prompts, with placeholders `{trigger}` and `{class_noun}`."""

import re
from collections.abc import Collection, Mapping
from typing import Annotated

from pydantic import AfterValidator

from rite_diffusion.errors import ConfigError
from rite_diffusion.types import Concept

# Braces around one name. Others, such as those of "{red|blue}", are ordinary text.
_PLACEHOLDER = re.compile(r"\{\s*[A-Za-z_]\w*\s*\}")
OF_CONCEPT, OF_CLASS = ("trigger", "class_noun"), ("class_noun",)


def words_of(concept: Concept) -> dict[str, str]:
    """Placeholder -> word, for a concept's templates."""
    return {"trigger": concept.trigger, "class_noun": concept.class_noun}


def fill(template: str, words: Mapping[str, str]) -> str:
    """The template with each placeholder `{name}` replaced by the word of that name.

    Raises ConfigError naming a placeholder that `words` does not have.
    """
    fault = unknown_placeholder(template, words)
    if fault:
        raise ConfigError(fault)
    return _PLACEHOLDER.sub(lambda found: words[found[0][1:-1]], template)


def unknown_placeholder(template: str, known: Collection[str]) -> str | None:
    """A message about a template's first unknown placeholder; None where all are known."""
    for found in _PLACEHOLDER.findall(template):
        if found[1:-1] not in known:
            names = " and ".join(f"{{{name}}}" for name in known)
            return f'unknown placeholder {found} in "{template}": only {names} can be filled in'
    return None


def _checked(known: Collection[str]) -> AfterValidator:
    def check(template: str) -> str:
        fault = unknown_placeholder(template, known)
        if fault:
            raise ValueError(fault)
        return template

    return AfterValidator(check)


ConceptTemplate = Annotated[str, _checked(OF_CONCEPT)]
ClassTemplate = Annotated[str, _checked(OF_CLASS)]  # of pictures that show no concept
