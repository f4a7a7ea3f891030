"""Custom Diffusion (Kumari et al. 2023): how cross-attentions read the text, and a modifier.

Keys and values of all cross-attentions train, whole or as LoRA, and a word that modifies its class:
a prompt that says "<robot>" is encoded as "<robot> robot" would be. Prior preservation and scaled
views are settings of their own, `prior` and `augment`.
"""

import torch
from torch import Tensor, nn

from rite_diffusion.backbones.protocols import Backbone
from rite_diffusion.config import TrainConfig
from rite_diffusion.methods.embedding_method import EmbeddingMethod
from rite_diffusion.methods.new_embeddings import NewEmbeddings
from rite_diffusion.methods.weights import FullWeights, LoraWeights

KEYS_AND_VALUES = (".attn2.to_k", ".attn2.to_v")


class CustomDiffusion(EmbeddingMethod):
    """Keys and values that learn from all of a text but its begin mark, and a modifier."""

    def __init__(self, backbone: Backbone, config: TrainConfig):
        targets = backbone.lora_targets(backbone.denoiser_name)
        paths = [path for path in targets if path.endswith(KEYS_AND_VALUES)]
        if config.custom_diffusion.weights == "lora":
            lora, home = config.lora, {backbone.denoiser_name: paths}
            weights = LoraWeights(
                backbone, home, rank=lora.rank, alpha=lora.alpha, seed=config.seed
            )
        else:
            weights = FullWeights(backbone, paths)
        new_placeholders = NewEmbeddings(backbone, config, named=True)
        super().__init__(backbone, config, weights, new_placeholders)
        denoiser = backbone.components[backbone.denoiser_name]
        layers = [denoiser.get_submodule(path) for path in paths]
        self._handles = [layer.register_forward_hook(_hold_begin_mark) for layer in layers]

    def remove(self) -> None:
        """Take weights, words and hooks out."""
        for handle in self._handles:
            handle.remove()
        super().remove()


def _hold_begin_mark(module: nn.Module, arguments: tuple, output: Tensor) -> Tensor:
    """Keys or values (B, tokens, width), the first token's without gradient.

    Every prompt has that token, so what it teaches would act on all of them.
    """
    return torch.cat([output[:, :1].detach(), output[:, 1:]], dim=1)
