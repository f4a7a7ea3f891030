"""Optimizers for LoRA, for any PyTorch model; this package needs only torch.

`LoraRite(lora_param_groups(model), lr=1e-3)` trains a model with LoRA layers of PEFT;
`OPTIMIZERS[name].build(groups)` builds an optimizer by name.
"""

from rite_diffusion.errors import ConfigError
from rite_diffusion.optim.adamw import ADAMW
from rite_diffusion.optim.adamw_plus import ADAMW_PLUS
from rite_diffusion.optim.factors import lora_param_groups
from rite_diffusion.optim.lora_muon import LORA_MUON, LoraMuon
from rite_diffusion.optim.prodigy import PRODIGY, Prodigy
from rite_diffusion.optim.rite import RITE, LoraRite
from rite_diffusion.optim.scaled_adamw import SCALED_ADAMW, ScaledAdamW
from rite_diffusion.optim.scaled_sgd import SCALED_SGD, ScaledSGD
from rite_diffusion.optim.schedule_free import ADAMW_SCHEDULE_FREE, ScheduleFreeAdamW
from rite_diffusion.optim.sgd import SGD
from rite_diffusion.optim.spec import OptimizerSpec

OPTIMIZERS: dict[str, OptimizerSpec] = {
    "adamw": ADAMW,
    "adamw_plus": ADAMW_PLUS,
    "adamw_schedule_free": ADAMW_SCHEDULE_FREE,
    "lora_muon": LORA_MUON,
    "prodigy": PRODIGY,
    "rite": RITE,
    "scaled_adamw": SCALED_ADAMW,
    "scaled_sgd": SCALED_SGD,
    "sgd": SGD,
}


def optimizer_spec(name: str) -> OptimizerSpec:
    """The specification of the optimizer of that name; ConfigError lists the known names."""
    if name not in OPTIMIZERS:
        raise ConfigError(f"no optimizer '{name}': choose one of {', '.join(sorted(OPTIMIZERS))}")
    return OPTIMIZERS[name]


__all__ = [
    "OPTIMIZERS",
    "LoraMuon",
    "LoraRite",
    "OptimizerSpec",
    "Prodigy",
    "ScaledAdamW",
    "ScaledSGD",
    "ScheduleFreeAdamW",
    "lora_param_groups",
    "optimizer_spec",
]
