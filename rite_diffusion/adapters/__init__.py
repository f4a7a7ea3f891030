"""The adapter file and its place in a base model."""

from rite_diffusion.adapters.adapter import Adapter, AdapterInfo
from rite_diffusion.adapters.attach import attach, detach, inject, read_pairs
from rite_diffusion.adapters.file import load_adapter, save_adapter

__all__ = [
    "Adapter",
    "AdapterInfo",
    "attach",
    "detach",
    "inject",
    "load_adapter",
    "read_pairs",
    "save_adapter",
]
