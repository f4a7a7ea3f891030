"""Learned embeddings in training, for the new words of a run's triggers."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rite_diffusion.backbones.protocols import Backbone, LearnedEmbedding
from rite_diffusion.config import TrainConfig, fill, words_of
from rite_diffusion.errors import ConfigError
from rite_diffusion.methods.method import NAME
from rite_diffusion.seeding import Stream, generator
from rite_diffusion.types import Concept


class NewEmbeddings:
    """Embeddings of the triggers' words that the base does not know, added to the backbone.

    The last vector of a concept starts as the embedding of `tokens.init`, the others as noise, the
    same in all layers (as in Mix-of-Show). Each word has `tokens.vectors` vectors: by default one,
    or `single_word_vectors` if the trigger is one word. `with_class_noun` appends the class noun's
    own embedding to the last word, without training it, unless the trigger has known words too.
    """

    def __init__(
        self,
        backbone: Backbone,
        config: TrainConfig,
        *,
        layers: int = 1,
        single_word_vectors: int = 1,
        with_class_noun: bool = False,
    ):
        self.backbone = backbone
        self.config = config
        # Word -> (layers, vectors, width) per text encoder. Embeddings of nouns do not train.
        self.learned: dict[str, list[nn.Parameter]] = {}
        self._nouns: dict[str, list[Tensor]] = {}
        for concept in config.concepts():
            words = new_placeholders(backbone, concept)
            vectors = config.tokens.vectors or (single_word_vectors if len(words) == 1 else 1)
            for word in words:
                self._refuse_known(word)
                starts = self._starts(concept, word == words[-1], vectors)
                learned = [nn.Parameter(each.expand(layers, -1, -1).clone()) for each in starts]
                self.learned[word] = learned
                if with_class_noun and word == words[-1] and words == concept.trigger.split():
                    noun = backbone.token_ids(concept.class_noun)
                    rows = [table[noun].float() for table in backbone.token_tables]
                    self._nouns[word] = [each.expand(layers, -1, -1) for each in rows]
                backbone.embeddings[word] = LearnedEmbedding(
                    NAME, lambda word=word: self.rows(word)
                )

    def _refuse_known(self, word: str) -> None:
        if word.lower() in {each.lower() for each in self.backbone.embeddings}:
            raise ConfigError(f"'{word}' has two meanings: give each concept words of its own")

    def _starts(self, concept: Concept, last: bool, vectors: int) -> list[Tensor]:
        """Initial values (vectors, width) of a word's embedding for each text encoder."""
        chosen = fill(self.config.tokens.init, words_of(concept))
        ids = self.backbone.token_ids(chosen) if last else []
        starts = []
        for number, table in enumerate(self.backbone.token_tables):
            draws = generator(self.config.seed, Stream.NEW_EMBEDDINGS, number, len(self.learned))
            deviation = self.config.tokens.deviation or table.float().std().item()
            start = deviation * torch.randn(vectors, table.shape[1], generator=draws)
            if ids:
                start[-1] = table[ids[-1]].float().cpu()  # of several tokens the head noun's
            starts.append(start.to(table.device))
        return starts

    def rows(self, word: str) -> list[Tensor]:
        """The tensors (layers, vectors, width) of a word per text encoder, with gradients."""
        learned: list[Tensor] = list(self.learned[word])
        nouns = self._nouns.get(word)
        if nouns is None:
            return learned
        return [torch.cat([own, noun], 1) for own, noun in zip(learned, nouns, strict=True)]

    def content(self) -> dict[str, Sequence[Tensor]]:
        """Word -> tensors per text encoder, for the adapter file."""
        return {word: self.rows(word) for word in self.learned}

    def group(self) -> dict:
        """The parameter group of the learned embeddings."""
        return {
            "name": "tokens",
            "params": [
                (f"tokens.{number}.{word}", vectors)
                for word, encoders in self.learned.items()
                for number, vectors in enumerate(encoders)
            ],
            "lr": self.config.optim.lr_tokens,
            "weight_decay": self.config.optim.weight_decay,
            "rate_free": False,
        }

    @torch.no_grad()
    def train(self, wanted: bool) -> None:
        """Set whether the embeddings train; not if their mean norm has reached `tokens.stop_norm`.

        Vectors that do not train keep their norms, so they never train again (as in Mix-of-Show).
        """
        vectors = [each for encoders in self.learned.values() for each in encoders]
        stop = self.config.tokens.stop_norm
        if stop is not None:
            norms = torch.cat([each.norm(dim=-1).flatten() for each in vectors])
            wanted = wanted and bool(norms.mean() < stop)
        for each in vectors:
            each.requires_grad_(wanted)


def new_placeholders(backbone: Backbone, concept: Concept) -> list[str]:
    """The words of a concept's trigger that the base does not know, which get embeddings."""
    return [word for word in concept.trigger.split() if not backbone.is_known_word(word)]
