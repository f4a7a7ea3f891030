"""Base models: loading them, and the interface that the rest of the toolkit uses."""

import logging
import os

# These libraries print warnings while they load that do not help this toolkit's users.
for _library in ("DIFFUSERS", "TRANSFORMERS"):
    os.environ.setdefault(f"{_library}_VERBOSITY", "error")
for _library in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_library).setLevel(logging.ERROR)
