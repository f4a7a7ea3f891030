"""The settings of a training, resolved over a preset."""

from collections.abc import Mapping
from typing import Any

from rite_diffusion.config import TrainConfig, load_preset, merge, preset_names, resolve
from rite_diffusion.errors import ConfigError
from rite_diffusion.methods import METHODS
from rite_diffusion.optim import optimizer_spec

PAIR_RATES = ("lr", "lr_unet", "lr_text_encoder")


def configure(settings: Mapping[str, Any], preset: str | None = None) -> TrainConfig:
    """The resolved configuration: settings over a preset, every rate filled in.

    The preset defaults to `pocket` on the pocket base and to `sd15` elsewhere, for other methods
    than LoRA to `pocket-pivotal` and the like. A preset's rates belong to its optimizer: another
    optimizer without a rate takes its own default, but for new words, which AdamW trains. With
    `optim.lr = "auto"` the rates stay open until the probe has found them.
    """
    low = load_preset(preset or _default_preset(settings))
    given, usual = _table(settings, "optim"), _table(low, "optim")
    if given.get("name") and given["name"] != usual.get("name"):
        usual = {key: value for key, value in usual.items() if key not in PAIR_RATES}
    if "lr" in given:
        usual.pop("lr_text_encoder", None)
    if usual:
        low = low | {"optim": usual}
    config = resolve(merge(low, dict(settings)))
    if config.method not in METHODS:
        raise ConfigError(f"no method '{config.method}': choose one of {', '.join(METHODS)}")
    if not config.trains_text_encoder and "lr_text_encoder" not in given:
        held = config.optim.model_copy(update={"lr_text_encoder": None})
        config = config.model_copy(update={"optim": held})
    optim = config.optim
    if optim.lr == "auto":
        optimizer_spec(optim.name)  # refuses an unknown name here
        return config
    lr = optim.lr or optimizer_spec(optim.name).lr
    given = {"lr": lr, "lr_unet": optim.lr_unet, "lr_text_encoder": optim.lr_text_encoder}
    rates = {key: rate for key, rate in given.items() if rate is not None}
    filled = config.with_rates(lr)
    return filled.model_copy(update={"optim": filled.optim.model_copy(update=rates)})


def _table(tree: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A table of a settings tree; empty where there is none, or what is no table."""
    found = tree.get(name)
    return dict(found) if isinstance(found, Mapping) else {}


def idle_rate(config: TrainConfig) -> str:
    """A line about a rate for a text encoder that does not train; empty where there is none."""
    rate = config.optim.lr_text_encoder
    if rate is None or config.trains_text_encoder:
        return ""
    custom = config.method == "custom_diffusion"
    why = "method = custom_diffusion" if custom else "lora.text_encoder = false"
    return f"optim.lr_text_encoder = {rate:g} is for nothing: the text encoder is held ({why})"


def _default_preset(settings: Mapping[str, Any]) -> str:
    base = "pocket" if settings.get("base", "pocket") == "pocket" else "sd15"
    own = f"{base}-{settings.get('method', 'lora')}"
    return own if own in preset_names() else base
