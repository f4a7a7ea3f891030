"""Fusion of several adapters into one: methods, statistics of layers' inputs, conflict reports."""

from rite_diffusion.fusion.layer import Factors, Layer
from rite_diffusion.fusion.methods import FUSIONS, Fusion
from rite_diffusion.fusion.settings import FusionSettings

__all__ = ["FUSIONS", "Factors", "Fusion", "FusionSettings", "Layer"]
