"""The settings of a training, resolved over a preset."""

from collections.abc import Mapping
from typing import Any

from rite_diffusion.backbones.families import family_name, is_flow
from rite_diffusion.config import TrainConfig, load_preset, merge, preset_names, resolve
from rite_diffusion.errors import ConfigError
from rite_diffusion.methods import METHODS
from rite_diffusion.methods.start import with_rank_of_start
from rite_diffusion.optim import OPTIMIZERS, optimizer_spec

PAIR_RATES = ("lr", "lr_unet", "lr_text_encoder")


def configure(settings: Mapping[str, Any], preset: str | None = None) -> TrainConfig:
    """The resolved settings of a training: `settings` over a preset, with every rate set.

    The preset defaults to `pocket` on the pocket base, to the family's on a flow transformer, such
    as `z-image`, and to `sd15` elsewhere, or to the method's, such as `pocket-pivotal`, where there
    is one. A preset's rates belong to its optimizer: with
    another optimizer and no rate given, that one's default applies, except to learned embeddings,
    which AdamW trains. With `optim.lr = "auto"` the rates stay None until the probe. Raises
    ConfigError for unknown or invalid settings.
    """
    low = load_preset(preset or _default_preset(settings))
    given, usual = _table(settings, "optim"), _table(low, "optim")
    if given.get("name") and given["name"] != usual.get("name"):
        usual = {key: value for key, value in usual.items() if key not in PAIR_RATES}
    if _is_schedule_free(given.get("name") or usual.get("name")):
        usual = usual | {"schedule": "constant"}
    if "lr" in given:
        usual.pop("lr_text_encoder", None)
    if usual:
        low = low | {"optim": usual}
    config = resolve(merge(low, dict(settings)))
    if config.method not in METHODS:
        raise ConfigError(f"no method '{config.method}': choose one of {', '.join(METHODS)}")
    lora = with_rank_of_start(config.lora, _table(settings, "lora"))
    config = config.model_copy(update={"lora": lora})
    if not config.trains_text_encoder and "lr_text_encoder" not in given:
        held = config.optim.model_copy(update={"lr_text_encoder": None})
        config = config.model_copy(update={"optim": held})
    optim = config.optim
    _refuse_schedule(config)
    if optim.lr == "auto":
        optimizer_spec(optim.name)  # refuses an unknown name here
        return config
    lr = optim.lr or optimizer_spec(optim.name).lr
    given = {"lr": lr, "lr_unet": optim.lr_unet, "lr_text_encoder": optim.lr_text_encoder}
    rates = {key: rate for key, rate in given.items() if rate is not None}
    filled = config.with_rates(lr)
    return filled.model_copy(update={"optim": filled.optim.model_copy(update=rates)})


def _is_schedule_free(name: Any) -> bool:
    return name in OPTIMIZERS and OPTIMIZERS[name].schedule_free


def _refuse_schedule(config: TrainConfig) -> None:
    """ConfigError where a decay or an average is asked for beside an optimizer's own average."""
    optim = config.optim
    if not _is_schedule_free(optim.name):
        return
    if optim.schedule != "constant":
        raise ConfigError(
            f"optim.schedule = {optim.schedule}: {optim.name} averages its steps instead of a "
            "decay. Leave it out, or use adamw."
        )
    if config.ema:
        raise ConfigError(f"ema = {config.ema}: {optim.name} has an average of its own. Use 0.")


def _table(tree: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A table of a settings tree; empty where it is missing or not a table."""
    found = tree.get(name)
    return dict(found) if isinstance(found, Mapping) else {}


def unused_rate_note(config: TrainConfig) -> str:
    """A line about a learning rate for a text encoder that does not train; empty without one."""
    rate = config.optim.lr_text_encoder
    if rate is None or config.trains_text_encoder:
        return ""
    custom = config.method == "custom_diffusion"
    why = "method = custom_diffusion" if custom else "lora.text_encoder = false"
    return (
        f"optim.lr_text_encoder = {rate:g} has no effect: the text encoder does not train ({why})"
    )


def captions_come_first(config: TrainConfig) -> bool:
    """Whether the conditioning of every caption can be computed before the first step."""
    frozen = METHODS[config.method].text_is_frozen(config)
    return frozen and config.cache and not config.captions.shuffle


def stage_names(config: TrainConfig) -> list[list[str]]:
    """The parts of a base that are in memory at once, stage by stage."""
    texts = ["text_encoder", "text_encoder_2", "text_encoder_3"]
    steps = ["unet", "transformer", *([] if captions_come_first(config) else texts)]
    return [["vae"], texts, steps]


def _base_preset(base: Any) -> str:
    """The preset of a base's family where there is one, else that of Stable Diffusion 1."""
    family = family_name(base) if isinstance(base, str) and is_flow(base) else None
    return family if family in preset_names() else "sd15"


def _default_preset(settings: Mapping[str, Any]) -> str:
    wanted = settings.get("base", "pocket")
    base = "pocket" if wanted == "pocket" else _base_preset(wanted)
    own = f"{base}-{settings.get('method', 'lora')}"
    return own if own in preset_names() else base
