"""PEFT configurations: the scale of each module, and refusal of what is not a plain LoRA.

Every setting of PEFT 0.21 is listed here. One that changes the meaning of the tensors is either
honoured or refused by name. An unknown one is refused if it is set.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from rite_diffusion.adapters.assemble import Scale
from rite_diffusion.adapters.names import dotted, split_name
from rite_diffusion.errors import AdapterError

Config = Mapping[str, Any]

_KINDS = ("LORA", "LOHA", "LOKR")

# Settings of training and of which layers were adapted, which do not change what the tensors mean.
# `fan_in_fan_out` is for transposed layers, which SD lacks; PEFT turns it off for all others.
_HARMLESS = set(
    """auto_mapping base_model_name_or_path corda_config decompose_both
    decompose_factor ensure_weight_tying eva_config exclude_modules fan_in_fan_out inference_mode
    init_weights layers_pattern layers_to_transform loftq_config lora_dropout lora_ga_config
    megatron_config megatron_core module_dropout peft_type peft_version qalora_group_size
    rank_dropout rank_dropout_scale revision runtime_config target_modules task_type
    use_effective_conv2d velora_config""".split()
)
_HONOURED = set(
    "alpha alpha_pattern lora_alpha lora_bias r rank_pattern use_dora use_rslora".split()
)
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")  # keep the base
_REMEDIES = {
    "modules_to_save": "it holds whole modules of its own beside the LoRA",
    "trainable_token_indices": "it holds rows of an embedding table beside the LoRA",
    "target_parameters": "it adapts parameters instead of layers",
    "layer_replication": "it is for a base whose layers are repeated",
    "alora_invocation_tokens": "it acts on some tokens only",
    "use_qalora": "its factors take averaged inputs",
}

_PLAIN = re.compile(r"\^?(\w|\\?\.)+")


def check_config(config: Config) -> None:
    """AdapterError naming the kind, or the first setting, that cannot be honoured."""
    kind = str(config.get("peft_type") or "LORA").removeprefix("PeftType.")
    if kind not in _KINDS:
        raise AdapterError(
            f"it is of PEFT's kind {kind}, which is not read: PEFT's `convert_to_lora` makes a "
            "LoRA of it, or merge it into its base and pass that as --base"
        )
    init = config.get("init_lora_weights")
    if init not in _PLAIN_INITS:
        raise AdapterError(
            f"init_lora_weights={init!r} changed the base model that it was trained on, so its "
            "factors do not fit the published base: save it again in PEFT by `model."
            "save_pretrained(folder, path_initial_model_for_weight_conversion=…)`"
        )
    if config.get("bias") not in (None, "none"):
        raise AdapterError(f"bias={config['bias']!r}: it holds whole biases; {_merging()}")
    for name, value in config.items():
        if value and name not in _HARMLESS | _HONOURED | {"init_lora_weights", "bias"}:
            reason = _REMEDIES.get(name, "this setting is not known to keep the factors plain")
            raise AdapterError(f"{name}={str(value)[:60]}: {reason}; {_merging()}")


def _merging() -> str:
    return "merge it into its base with PEFT's `merge_and_unload` and pass that as --base"


def check_modules(
    configs: Mapping[str, Config], modules: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """AdapterError where tensors and configuration disagree about DoRA or the bias of `up`."""
    for name, parts in modules.items():
        config = configs.get(split_name(name)[0], {}) if configs else {}
        for setting, role in (("use_dora", "magnitude"), ("lora_bias", "up_bias")):
            stated = config.get(setting)
            if stated is not None and "up" in parts and bool(stated) != (role in parts):
                raise AdapterError(
                    f"its configuration has {setting}={stated}, but {name} does not: get the "
                    "configuration and tensors of the same training"
                )


def stated_scale(configs: Mapping[str, Config]) -> Scale:
    """A function that returns a module's scale by its component's configuration.

    The function raises AdapterError where alpha or rank is missing or contradicts the tensors.
    """

    def scale(name: str, rank: int | None) -> float | None:
        component, flat = split_name(name)
        config = configs.get(component, {})
        alpha = config.get("lora_alpha", config.get("alpha"))
        if alpha is None:
            return None
        paths = _paths(component, dotted(flat))
        alpha = _exception(config, "alpha_pattern", paths, alpha)
        if not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise AdapterError(f"the configuration's alpha of {name} is {alpha!r}")
        stated = _exception(config, "rank_pattern", paths, config.get("r", rank))
        if not isinstance(stated, int) or stated < 1 or rank not in (None, stated):
            raise AdapterError(
                f"its configuration has rank {stated}, {name} has {rank}: get the configuration "
                "and tensors of the same training"
            )
        return alpha / (math.sqrt(stated) if config.get("use_rslora") else stated)

    return scale


def _paths(component: str, path: str) -> list[str]:
    """A module's path with and without the level `text_model`, which transformers 5.6 dropped."""
    return [path] if component == "unet" else [path, path.removeprefix("text_model.")]


def _exception(config: Config, table: str, paths: list[str], default: Any) -> Any:
    """The value of the first pattern that matches, in PEFT's order, else the default.

    AdapterError for patterns other than plain names: PEFT would run any regular expression, and one
    from a downloaded file could run for ever.
    """
    patterns = config.get(table) or {}
    if not isinstance(patterns, Mapping):
        raise AdapterError(f"the configuration's {table} is not a table")
    for pattern, value in patterns.items():
        if not _PLAIN.fullmatch(pattern):
            raise AdapterError(f"the configuration's pattern '{pattern}' is not a module's name")
        if any(re.match(rf"(.*\.)?({pattern})$", path) for path in paths):
            return value
    return default
