"""What of a configuration a base cannot be trained with."""

from rite_diffusion.backbones.protocols import Backbone
from rite_diffusion.config import TrainConfig
from rite_diffusion.errors import ConfigError

REASONS = {
    "pivotal": "its text encoder's embeddings are not trained",
    "custom_diffusion": "it has no layers that read text alone",
    "ed_lora": "it has no cross-attentions for words that differ from layer to layer",
}


def check_support(backbone: Backbone, config: TrainConfig) -> None:
    """Raise ConfigError for a method, an encoder or a distilled base that cannot be trained."""
    support = backbone.support
    if support.methods is not None and config.method not in support.methods:
        why = REASONS.get(config.method, "it is not made for this kind of base")
        raise ConfigError(
            f"method {config.method} does not train {backbone.name} ({backbone.family}): {why}. "
            f"Use {' or '.join(sorted(support.methods))}."
        )
    if config.lora.text_encoder and not support.text_encoder:
        raise ConfigError(
            f"lora.text_encoder = true: the text encoder of {backbone.name} ({backbone.family}) is "
            "not adapted. Set it to false, or use the family's preset."
        )
    if support.distilled and not (config.lora.distilled or config.lora.assistant):
        raise ConfigError(
            f"{backbone.name} is distilled to few steps: a LoRA trained on it mostly undoes that. "
            f"Instead {support.distilled}, give a training adapter (lora.assistant), or set "
            "lora.distilled = true."
        )
