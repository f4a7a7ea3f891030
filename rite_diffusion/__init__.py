"""Teach a text-to-image diffusion model new concepts from a handful of photos.

    import rite_diffusion as rite

    adapter = rite.train("photos/dog", trigger="<dog>", class_noun="dog")
    images = rite.generate("a <dog> on a blue background", adapters=[adapter], seed=0)

Everything heavy is imported on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from rite_diffusion._version import __version__

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
    "convert": "rite_diffusion.api.convert",
    "train": "rite_diffusion.api.train",
    "generate": "rite_diffusion.api.generate",
    "inspect": "rite_diffusion.api.inspect",
    "fuse": "rite_diffusion.api.fuse",
    "sketch": "rite_diffusion.api.sketch",
    "grid": "rite_diffusion.api.sheet",
    "make_masks": "rite_diffusion.api.masks",
    "RiteError": "rite_diffusion.errors",
}

if TYPE_CHECKING:
    from rite_diffusion.api.convert import convert
    from rite_diffusion.api.fuse import fuse
    from rite_diffusion.api.generate import generate
    from rite_diffusion.api.inspect import inspect
    from rite_diffusion.api.masks import make_masks
    from rite_diffusion.api.sheet import grid
    from rite_diffusion.api.sketch import sketch
    from rite_diffusion.api.train import train
    from rite_diffusion.errors import RiteError


def __getattr__(name: str):
    """Import a public function from its module when it is first asked for (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'rite_diffusion' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
