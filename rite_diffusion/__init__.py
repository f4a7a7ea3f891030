"""Teach a text-to-image diffusion model new concepts from a handful of photos.

    import rite_diffusion as rite

    adapter = rite.train("photos/dog", trigger="<dog>", class_noun="dog")
    images = rite.generate("a <dog> on a blue background", adapters=[adapter], seed=0)

Everything heavy is imported on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = [
    "RiteError",
    "__version__",
    "convert",
    "fuse",
    "generate",
    "grid",
    "inspect",
    "make_masks",
    "sketch",
    "train",
]

_HOMES = {
    "convert": "rite_diffusion.conversion",
    "train": "rite_diffusion.recipes",
    "generate": "rite_diffusion.recipes",
    "inspect": "rite_diffusion.recipes",
    "fuse": "rite_diffusion.merging",
    "sketch": "rite_diffusion.sketching",
    "grid": "rite_diffusion.sheets",
    "make_masks": "rite_diffusion.masking",
    "RiteError": "rite_diffusion.types",
}

if TYPE_CHECKING:
    from rite_diffusion.conversion import convert
    from rite_diffusion.masking import make_masks
    from rite_diffusion.merging import fuse
    from rite_diffusion.recipes import generate, inspect, train
    from rite_diffusion.sheets import grid
    from rite_diffusion.sketching import sketch
    from rite_diffusion.types import RiteError


def __getattr__(name: str):
    """Import a public function from its module when it is first asked for (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'rite_diffusion' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
