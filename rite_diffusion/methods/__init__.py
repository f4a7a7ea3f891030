"""Methods of learning a concept; METHODS has them by name."""

from rite_diffusion.methods.custom_diffusion import CustomDiffusion
from rite_diffusion.methods.ed_lora import EdLora
from rite_diffusion.methods.lora import PlainLora
from rite_diffusion.methods.method import Method
from rite_diffusion.methods.pivotal import Pivotal

METHODS: dict[str, type[Method]] = {
    "lora": PlainLora,
    "pivotal": Pivotal,
    "custom_diffusion": CustomDiffusion,
    "ed_lora": EdLora,
}

__all__ = ["METHODS", "Method", "PlainLora"]
