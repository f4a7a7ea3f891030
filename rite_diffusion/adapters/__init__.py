"""Adapter files, read and written without a model; `adapters.attach` attaches one to a base."""

from rite_diffusion.adapters.adapter import Adapter, AdapterInfo
from rite_diffusion.adapters.file import load_adapter, save_adapter

__all__ = ["Adapter", "AdapterInfo", "load_adapter", "save_adapter"]
