"""Base models: where they come from and how the toolkit talks to them."""

import diffusers.utils.logging
import transformers.utils.logging

# Both libraries draw progress bars and warn of what is no concern of this toolkit's user.
for _library in (transformers.utils.logging, diffusers.utils.logging):
    _library.set_verbosity_error()
    _library.disable_progress_bar()

from rite_diffusion.backbones.source import load_backbone  # noqa: E402
from rite_diffusion.backbones.stable_diffusion import StableDiffusion  # noqa: E402

__all__ = ["StableDiffusion", "load_backbone"]
