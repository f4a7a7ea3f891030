"""Custom Diffusion (Kumari et al. 2023): keys and values of cross-attentions, and a modifier.

The key and value matrices of all cross-attentions train, whole or as LoRA, with a learned embedding
that modifies the class noun: "<robot>" in a prompt is encoded as "<robot> robot". Prior
preservation and scaled views are settings of their own, `prior` and `augment`.
"""

import torch
from torch import Tensor, nn

from rite_diffusion.backbones.protocols import Backbone
from rite_diffusion.config import TrainConfig
from rite_diffusion.methods.embedding_method import EmbeddingMethod
from rite_diffusion.methods.new_embeddings import NewEmbeddings
from rite_diffusion.methods.weights import FullWeights, new_weights

KEYS_AND_VALUES = (".attn2.to_k", ".attn2.to_v")


class CustomDiffusion(EmbeddingMethod):
    """Trains keys and values, without gradients from the begin token, and a modifier embedding."""

    def __init__(self, backbone: Backbone, config: TrainConfig):
        targets = backbone.lora_targets(backbone.denoiser_name)
        paths = [path for path in targets if path.endswith(KEYS_AND_VALUES)]
        if config.custom_diffusion.weights == "lora":
            home = {backbone.denoiser_name: paths}
            weights = new_weights(backbone, home, config.lora, config.seed)
        else:
            weights = FullWeights(backbone, paths)
        embeddings = NewEmbeddings(backbone, config, with_class_noun=True)
        super().__init__(backbone, config, weights, embeddings)
        denoiser = backbone.components[backbone.denoiser_name]
        layers = [denoiser.get_submodule(path) for path in paths]
        self._handles = [layer.register_forward_hook(_hold_begin_mark) for layer in layers]

    def remove(self) -> None:
        """Remove weights, learned embeddings and hooks."""
        for handle in self._handles:
            handle.remove()
        super().remove()


def _hold_begin_mark(module: nn.Module, arguments: tuple, output: Tensor) -> Tensor:
    """Keys or values (B, tokens, width), the first token's without gradient.

    Every prompt has that token: what it learns would change all prompts.
    """
    return torch.cat([output[:, :1].detach(), output[:, 1:]], dim=1)
