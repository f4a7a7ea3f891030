"""A frozen adapter that acts while another one trains, and not in previews or the result.

On a base that is distilled to few steps, such a training adapter undoes the distillation for as
long as something is learned, so that the base still draws in few steps afterwards.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from rite_diffusion.adapters import Adapter, load_adapter
from rite_diffusion.adapters.attach import attach, check_base, detach, set_weight, train_beside
from rite_diffusion.adapters.names import split_name
from rite_diffusion.backbones.protocols import Backbone
from rite_diffusion.config import TrainConfig
from rite_diffusion.errors import ConfigError
from rite_diffusion.files.writing import user_path
from rite_diffusion.methods.method import NAME

ASSISTANT = "assistant"


def load_assistant(backbone: Backbone, config: TrainConfig) -> Adapter | None:
    """The adapter that `lora.assistant` names, None without one.

    Raises AdapterError where it cannot be read or is for another base, and ConfigError where it
    changes more than the denoiser: captions are encoded once, without it.
    """
    if config.lora.assistant is None:
        return None
    adapter = load_adapter(user_path(config.lora.assistant))
    check_base(backbone, adapter, "lora.assistant")
    others = {split_name(name)[0] for name in adapter.modules()} - {backbone.denoiser_name}
    if others or adapter.tokens:
        what = "learned embeddings" if adapter.tokens else ", ".join(sorted(others))
        raise ConfigError(f"lora.assistant may change the denoiser alone; this one has {what}.")
    return adapter


@contextmanager
def assisted(backbone: Backbone, config: TrainConfig) -> Iterator[None]:
    """Attach the assistant, if there is one, until the block ends."""
    adapter = load_assistant(backbone, config)
    if adapter is None:
        yield
        return
    attach(backbone, adapter, ASSISTANT)
    try:
        yield
    finally:
        detach(backbone, ASSISTANT)


def act_together(backbone: Backbone, config: TrainConfig) -> None:
    """Let the assistant, frozen, and the pairs that train act at once."""
    if config.lora.assistant is not None:
        train_beside(backbone, ASSISTANT, NAME)


@contextmanager
def unassisted(backbone: Backbone, config: TrainConfig) -> Iterator[None]:
    """Let the assistant, if there is one, not act until the block ends."""
    if config.lora.assistant is None:
        yield
        return
    set_weight(backbone, ASSISTANT, 0.0)
    try:
        yield
    finally:
        set_weight(backbone, ASSISTANT, 1.0)
