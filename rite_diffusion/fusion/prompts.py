"""The prompts that are drawn for statistics."""

from pathlib import Path

from rite_diffusion.adapters import AdapterInfo
from rite_diffusion.config import fill
from rite_diffusion.errors import FusionError

# The trigger alone, and in the context of common prompts.
CONCEPT = (
    "{trigger}",
    "a {trigger}",
    "a photo of a {trigger}",
    "a {trigger} on a blue background",
    "a picture of a {trigger} on a white background",
)
# The empty prompt of classifier-free guidance, and ordinary things.
ORDINARY = (
    "",
    "a photo of a person",
    "a dog on a green background",
    "a red car on a street",
    "a house and a tree",
    "a cup on a table",
)


def concept_prompts(info: AdapterInfo, file: Path) -> list[str]:
    """Prompts with an adapter's triggers; FusionError where its file does not state one."""
    triggers = info.triggers()
    if not triggers:
        raise FusionError(
            f"{file} does not state the trigger of its concept: make its sketch first, with "
            f'`rite sketch {file} --prompt "a photo of …"`.'
        )
    return [fill(prompt, {"trigger": trigger}) for trigger in triggers for prompt in CONCEPT]


def ordinary_prompts(info: AdapterInfo) -> list[str]:
    """Prompts that an adapter should not change; its class is one of them."""
    nouns = [noun.strip() for noun in info.class_noun.split(",") if noun.strip()]
    return [*ORDINARY, *(f"a photo of a {noun}" for noun in nouns)]
