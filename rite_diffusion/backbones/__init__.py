"""Base models: loading them, and the interface that the rest of the toolkit uses."""

import os

# Both libraries print warnings while they load that do not help this toolkit's users.
for _library in ("DIFFUSERS", "TRANSFORMERS"):
    os.environ.setdefault(f"{_library}_VERBOSITY", "error")
