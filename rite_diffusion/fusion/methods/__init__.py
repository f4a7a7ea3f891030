"""The fusion methods: one file each, FUSIONS by name."""

from collections.abc import Callable
from dataclasses import dataclass

from rite_diffusion.fusion.layer import Factors, Layer
from rite_diffusion.fusion.low_rank import cut_dense, cut_to_rank
from rite_diffusion.fusion.methods.concat import concat
from rite_diffusion.fusion.methods.custom_diffusion import custom_diffusion
from rite_diffusion.fusion.methods.dare import dare
from rite_diffusion.fusion.methods.gradient import gradient
from rite_diffusion.fusion.methods.gram import cut_on_inputs, gram
from rite_diffusion.fusion.methods.knots import knots
from rite_diffusion.fusion.methods.svd import cut_to_error, svd
from rite_diffusion.fusion.methods.ties import ties
from rite_diffusion.fusion.methods.weighted import weighted
from rite_diffusion.fusion.settings import FusionSettings


@dataclass(frozen=True)
class Fusion:
    """A method: how it fuses a layer, whether it needs statistics, and how it limits the rank."""

    fuse_layer: Callable[[Layer, FusionSettings], Factors]
    statistics: bool
    cut: Callable[[Layer, Factors, FusionSettings], Factors] = cut_to_rank


FUSIONS = {
    "gram": Fusion(gram, statistics=True, cut=cut_on_inputs),
    "weighted": Fusion(weighted, statistics=False),
    "concat": Fusion(concat, statistics=False),
    "svd": Fusion(svd, statistics=False, cut=cut_to_error),
    "ties": Fusion(ties, statistics=False, cut=cut_dense),
    "dare": Fusion(dare, statistics=False, cut=cut_dense),
    "knots": Fusion(knots, statistics=False),
    "custom_diffusion": Fusion(custom_diffusion, statistics=True),
    "gradient": Fusion(gradient, statistics=True),
}

__all__ = ["FUSIONS", "Fusion"]
