"""Base models: where they come from and how the toolkit talks to them."""

import os

# As they load, both libraries warn of what is no concern of this toolkit's user.
for _library in ("DIFFUSERS", "TRANSFORMERS"):
    os.environ.setdefault(f"{_library}_VERBOSITY", "error")
