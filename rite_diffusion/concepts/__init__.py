"""How a concept is learned: METHODS by name."""

from rite_diffusion.concepts.lora import PlainLora
from rite_diffusion.concepts.method import Method

METHODS: dict[str, type[Method]] = {"lora": PlainLora}

__all__ = ["METHODS", "Method", "PlainLora"]
