"""An adapter's learned embeddings: attached to a model, removed, and renamed where words clash."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from rite_diffusion.adapters.adapter import Adapter
from rite_diffusion.adapters.dialects.embeddings import SECOND
from rite_diffusion.backbones.protocols import Backbone, LearnedEmbedding
from rite_diffusion.errors import AdapterError


def words_of(adapter: Adapter) -> dict[str, list[Tensor]]:
    """Word -> its learned embedding (layers, vectors, width) for each text encoder."""
    words: dict[str, list[Tensor]] = {}
    for word, rows in sorted(adapter.tokens.items()):  # "<w>" comes before "<w>@2"
        words.setdefault(word.removesuffix(SECOND), []).append(rows)
    return words


def tokens_of(words: Mapping[str, Sequence[Tensor]]) -> dict[str, Tensor]:
    """The inverse of `words_of`: an adapter's `tokens`."""
    return {
        word + SECOND * number: rows.detach()
        for word, encoders in words.items()
        for number, rows in enumerate(encoders)
    }


def check_embeddings(backbone: Backbone, adapter: Adapter) -> None:
    """AdapterError where an embedding does not fit the model, or its word is taken."""
    widths = [table.shape[1] for table in backbone.token_tables]
    layers = (1, len(backbone.cross_attentions))
    taken = {word.lower(): each.adapter for word, each in backbone.embeddings.items()}
    for word, rows in words_of(adapter).items():
        found = [each.shape[-1] for each in rows]
        if found != widths or len({each.shape[1] for each in rows}) > 1:
            raise AdapterError(
                f"the word '{word}' has vectors of {_listed(found)} numbers, the text encoders of "
                f"{backbone.name} take {_listed(widths)}: it was made for another base model."
            )
        if {len(each) for each in rows} - set(layers):
            raise AdapterError(
                f"the word '{word}' has vectors for {len(rows[0])} cross-attentions, "
                f"{backbone.name} has {layers[1]}: it was made for another base model."
            )
        if word.lower() in taken:
            raise AdapterError(f"adapter '{taken[word.lower()]}' already has the word '{word}'")


def _listed(numbers: list[int]) -> str:
    return " and ".join(map(str, numbers))


def add_embeddings(backbone: Backbone, adapter: Adapter, name: str) -> None:
    """Make an adapter's learned embeddings available to prompts."""
    for word, rows in words_of(adapter).items():
        here = [each.to(backbone.device) for each in rows]
        backbone.embeddings[word] = LearnedEmbedding(name, lambda here=here: here)


def remove_embeddings(backbone: Backbone, name: str) -> None:
    """Remove the learned embeddings of an adapter."""
    for word in [word for word, each in backbone.embeddings.items() if each.adapter == name]:
        del backbone.embeddings[word]


def free_names(words: Collection[str], taken: Collection[str]) -> dict[str, str]:
    """A new name for each word that is taken: `<dog>` -> `<dog-2>`."""
    used = {word.lower() for word in taken} | {word.lower() for word in words}
    found = {}
    for word in words:
        if word.lower() in {each.lower() for each in taken}:
            stem, end = (word[:-1], ">") if word.endswith(">") else (word, "")
            names = (f"{stem}-{number}{end}" for number in range(2, len(used) + 3))
            found[word] = next(name for name in names if name.lower() not in used)
            used.add(found[word].lower())
    return found


def renamed(adapter: Adapter, names: dict[str, str]) -> Adapter:
    """The adapter with words renamed, old -> new, in its embeddings and its trigger."""
    if not names:
        return adapter
    words = {names.get(word, word): rows for word, rows in words_of(adapter).items()}
    pattern = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    trigger = re.sub(pattern, lambda found: names[found[0]], adapter.info.trigger)
    return replace(adapter, tokens=tokens_of(words), info=replace(adapter.info, trigger=trigger))
