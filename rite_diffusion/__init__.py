"""Teach a text-to-image diffusion model new concepts from a handful of photos.

    import rite_diffusion as rite

    adapter = rite.train("photos/dog", trigger="<dog>", class_noun="dog")
    images = rite.generate("a <dog> on a blue background", adapters=[adapter], seed=0)

Modules are imported on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from rite_diffusion._version import __version__

__all__ = [
    "Adapter",
    "AdapterInfo",
    "Backbone",
    "Batch",
    "CaptionReport",
    "CaptionSection",
    "Drawing",
    "Export",
    "FusionOptions",
    "LatentSet",
    "Lora",
    "LoraPair",
    "MaskReport",
    "Method",
    "ObjectiveSection",
    "PhotoFinding",
    "RiteError",
    "StepReport",
    "SweepResult",
    "SweepRow",
    "TrainSettings",
    "__version__",
    "caption",
    "check_photos",
    "convert",
    "diffusion_loss",
    "draw_batch",
    "encode_photos",
    "fuse",
    "generate",
    "grid",
    "inspect",
    "load_base",
    "make_masks",
    "optim",
    "sketch",
    "sweep",
    "sweep_status",
    "train",
]

_HOMES = {
    "Adapter": "rite_diffusion.adapters.adapter",
    "AdapterInfo": "rite_diffusion.adapters.adapter",
    "Backbone": "rite_diffusion.backbones.protocols",
    "Batch": "rite_diffusion.training.batch",
    "CaptionReport": "rite_diffusion.api.caption",
    "CaptionSection": "rite_diffusion.config.schema",
    "Drawing": "rite_diffusion.fusion.statistics",
    "Export": "rite_diffusion.api.convert",
    "FusionOptions": "rite_diffusion.fusion.settings",
    "LatentSet": "rite_diffusion.photos.dataset",
    "Lora": "rite_diffusion.methods.lora",
    "LoraPair": "rite_diffusion.types",
    "MaskReport": "rite_diffusion.api.masks",
    "Method": "rite_diffusion.methods.method",
    "ObjectiveSection": "rite_diffusion.config.schema",
    "PhotoFinding": "rite_diffusion.photos.findings",
    "RiteError": "rite_diffusion.errors",
    "StepReport": "rite_diffusion.training.trainer",
    "SweepResult": "rite_diffusion.sweeps.report",
    "SweepRow": "rite_diffusion.sweeps.report",
    "TrainSettings": "rite_diffusion.config.typed",
    "caption": "rite_diffusion.api.caption",
    "check_photos": "rite_diffusion.api.photos",
    "convert": "rite_diffusion.api.convert",
    "diffusion_loss": "rite_diffusion.training.loss",
    "draw_batch": "rite_diffusion.training.batch",
    "encode_photos": "rite_diffusion.api.encode",
    "fuse": "rite_diffusion.api.fuse",
    "generate": "rite_diffusion.api.generate",
    "grid": "rite_diffusion.api.sheet",
    "inspect": "rite_diffusion.api.inspect",
    "load_base": "rite_diffusion.api.bases",
    "make_masks": "rite_diffusion.api.masks",
    "sketch": "rite_diffusion.api.sketch",
    "sweep": "rite_diffusion.api.sweep",
    "sweep_status": "rite_diffusion.api.sweep",
    "train": "rite_diffusion.api.train",
}

if TYPE_CHECKING:
    from rite_diffusion import optim
    from rite_diffusion.adapters.adapter import Adapter, AdapterInfo
    from rite_diffusion.api.bases import load_base
    from rite_diffusion.api.caption import CaptionReport, caption
    from rite_diffusion.api.convert import Export, convert
    from rite_diffusion.api.encode import encode_photos
    from rite_diffusion.api.fuse import fuse
    from rite_diffusion.api.generate import generate
    from rite_diffusion.api.inspect import inspect
    from rite_diffusion.api.masks import MaskReport, make_masks
    from rite_diffusion.api.photos import check_photos
    from rite_diffusion.api.sheet import grid
    from rite_diffusion.api.sketch import sketch
    from rite_diffusion.api.sweep import sweep, sweep_status
    from rite_diffusion.api.train import train
    from rite_diffusion.backbones.protocols import Backbone
    from rite_diffusion.config.schema import CaptionSection, ObjectiveSection
    from rite_diffusion.config.typed import TrainSettings
    from rite_diffusion.errors import RiteError
    from rite_diffusion.fusion.settings import FusionOptions
    from rite_diffusion.fusion.statistics import Drawing
    from rite_diffusion.methods.lora import Lora
    from rite_diffusion.methods.method import Method
    from rite_diffusion.photos.dataset import LatentSet
    from rite_diffusion.photos.findings import PhotoFinding
    from rite_diffusion.sweeps.report import SweepResult, SweepRow
    from rite_diffusion.training.batch import Batch, draw_batch
    from rite_diffusion.training.loss import diffusion_loss
    from rite_diffusion.training.trainer import StepReport
    from rite_diffusion.types import LoraPair


def __getattr__(name: str):
    """A public name, imported from its module on first access (PEP 562)."""
    if name == "optim":
        return import_module("rite_diffusion.optim")
    if name not in _HOMES:
        raise AttributeError(f"module 'rite_diffusion' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """The public names."""
    return __all__
