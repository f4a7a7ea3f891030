"""Several adapters into one: a method per file, statistics of inputs, a report of conflicts."""

from rite_diffusion.fusion.layer import Factors, Layer
from rite_diffusion.fusion.methods import FUSIONS, Fusion
from rite_diffusion.fusion.settings import FusionSettings

__all__ = ["FUSIONS", "Factors", "Fusion", "FusionSettings", "Layer"]
