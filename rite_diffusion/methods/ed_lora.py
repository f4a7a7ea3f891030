"""ED-LoRA, the single-concept method of Mix-of-Show (Gu et al. 2023, arXiv 2305.18292).

Each concept has two vectors, the first for its appearance and the second for its class, with values
of their own in every cross-attention (Voynov et al. 2023), and LoRA in the attention of UNet and
text encoder at scale 1. A penalty keeps the vectors' attention maps inside the subject's mask, as
in the released code.
"""

from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rite_diffusion.backbones.attention_maps import AttentionRecorder
from rite_diffusion.backbones.protocols import Backbone
from rite_diffusion.config import TrainConfig
from rite_diffusion.methods.embedding_method import EmbeddingMethod
from rite_diffusion.methods.new_embeddings import NewEmbeddings, new_placeholders
from rite_diffusion.methods.weights import lora_weights
from rite_diffusion.seeding import Stream, generator

CAPTIONS_KEPT = 256  # captions whose token positions stay in memory
INSIDE = 0.5  # mask of a latent cell above which it belongs to the subject


class EdLora(EmbeddingMethod):
    """Layer-wise learned embeddings, LoRA, and a penalty on the embeddings' attention maps."""

    wants_masks = True

    def __init__(self, backbone: Backbone, config: TrainConfig):
        weights = lora_weights(backbone, config)
        drawn = weights.pairs() if config.lora.init == "gaussian" else []  # of LoHa, LoKr none
        for number, pair in enumerate(drawn):  # as torch initialises linear layers
            draws = generator(config.seed, Stream.NEW_EMBEDDINGS, number)
            nn.init.kaiming_uniform_(pair.down, a=5**0.5, generator=draws)
        layers = len(backbone.cross_attentions)
        learned = NewEmbeddings(backbone, config, layers=layers, single_word_vectors=2)
        super().__init__(backbone, config, weights, learned)
        self._concepts = [
            tuple(new_placeholders(backbone, concept)) for concept in config.concepts()
        ]
        self._positions = lru_cache(CAPTIONS_KEPT)(self._find)
        watched = backbone.cross_attentions if config.attention.weight else []
        self._recorder = AttentionRecorder(watched)

    def penalty(self, captions: list[str], masks: Tensor | None) -> Tensor | float:
        """The weighted mean of `attention_penalty` over samples whose caption has a concept."""
        settings = self.config.attention
        if masks is None or not settings.weight:
            return 0.0
        subjects = (masks > INSIDE).float()
        parts = list[Tensor]()
        for words in self._concepts:
            places = [self._positions(caption, words) for caption in captions]
            samples = [i for i, own in enumerate(places) if own]
            if samples:
                chosen = [places[i] for i in samples]
                maps = self._recorder.maps(samples, chosen, *masks.shape[-2:])
                each = [attention_penalty(m, subjects[samples], settings.subject) for m in maps]
                parts.append(torch.stack(each).sum(0))
        self._recorder.clear()
        return settings.weight * torch.cat(parts).mean() if parts else 0.0

    def _find(self, caption: str, words: tuple[str, ...]) -> list[int]:
        """Token positions of a concept's vectors in a caption; [] unless all of them are there."""
        found = [self.backbone.token_positions(caption, word) for word in words]
        whole = [self.backbone.embeddings[word].rows()[0].shape[1] for word in words]
        complete = [len(own) for own in found] == whole
        return [place for own in found for place in own] if complete else []

    def remove(self) -> None:
        """Remove weights, learned embeddings and hooks."""
        self._recorder.remove()
        super().remove()


def attention_penalty(maps: Tensor, subjects: Tensor, subject: str) -> Tensor:
    """Penalty (B,) on the attention maps (B, n, h, w) of a concept's vectors.

    Maps are divided by their maxima. The penalty of all vectors but the last, which describe the
    appearance, is the mean of their maps outside the subject. That of the last, which stands for
    the class, is the same, or with subject = "fit" its mean squared difference from the mask.
    `subjects` (B, 1, H, W) is 1 in the latent cells of the subject. Without cells outside, the mean
    is 0.
    """
    height, width = maps.shape[-2:]
    covered = F.adaptive_avg_pool2d(subjects, (height, width))  # (B, 1, h, w)
    maps = maps / maps.amax((-2, -1), keepdim=True).clamp(min=torch.finfo(maps.dtype).tiny)
    outside = (covered == 0).float()
    spread = (maps * outside).sum((-2, -1)) / outside.sum((-2, -1)).clamp(min=1)  # (B, n)
    looks = spread[:, :-1].mean(1) if maps.shape[1] > 1 else torch.zeros_like(spread[:, 0])
    if subject == "fit":
        return looks + (maps[:, -1] - covered[:, 0]).square().mean((-2, -1))
    return looks + spread[:, -1]
