"""The family of an adapter's base model, "sd" or "sdxl", on which other tools' names depend.

Stable Diffusion 1 and 2 have four levels, XL has three; many modules have the same name in both.
The family is found by, in this order: modules that only one of them has, the file's header, the
spelling of names in the file, and the widths of the published models.
"""

import re
from collections.abc import Iterable, Mapping

from rite_diffusion.adapters.adapter import Adapter
from rite_diffusion.adapters.names import Family
from rite_diffusion.types import LoraPair

_ONLY_XL = re.compile(r"lora_te2_|lora_unet_(add_embedding_|.*_transformer_blocks_[1-9])")
_ONLY_SD = re.compile(
    r"lora_unet_(down_blocks_(3|0_attentions|2_downsamplers)|up_blocks_(3|2_attentions|2_upsampl))"
)
_STATED_OURS: dict[str, Family] = {"sd": "sd", "sdxl": "sdxl"}
# Keys of kohya's and of ModelSpec's headers -> beginnings of their values.
_STATED: dict[str, dict[str, Family]] = {
    "ss_base_model_version": {"sdxl": "sdxl", "sd_v": "sd", "sd_1": "sd", "sd_2": "sd"},
    "modelspec.architecture": {"stable-diffusion-xl": "sdxl", "stable-diffusion-v": "sd"},
}
# Tensor names with dots as underscores. Kohya uses the names of Stability's code for SDXL alone.
_SPELT: dict[str, Family] = {
    r"(.*_)?output_blocks_2_1_conv_": "sd",
    r"(.*_)?output_blocks_2_2_conv_": "sdxl",
    r"lora_(te[12]|unet_(input|middle|output)_blocks?)_": "sdxl",
    r"lora_te_": "sd",
}
_UP = re.compile(r"lora_unet_up_blocks_([12])_(?:resnets_\d_(?:conv|time_emb)|upsamplers_0_conv)")
_OUTPUTS: dict[tuple[str, int], Family] = {
    ("1", 1280): "sd",
    ("1", 640): "sdxl",
    ("2", 640): "sd",
    ("2", 320): "sdxl",
}
_SKIP = re.compile(r"lora_unet_up_blocks_0_resnets_2_conv(1|_shortcut)")
_SKIP_INPUTS: dict[int, Family] = {2560: "sd", 1920: "sdxl"}
_TEXT_STATES: dict[int, Family] = {768: "sd", 1024: "sd", 2048: "sdxl"}


def family_of(adapter: Adapter) -> Family | None:
    """The family of an adapter's base; None where it cannot be found."""
    found = _STATED_OURS.get(adapter.info.family) or _by_modules(adapter.modules())
    if found is not None:
        return found
    return next((family for pair in adapter.pairs if (family := _by_width(pair))), None)


def family_of_file(header: Mapping[str, str], keys: Iterable[str]) -> Family | None:
    """The family that a file's header states, else the one that its tensors' names suggest."""
    for entry, beginnings in _STATED.items():
        for beginning, family in beginnings.items():
            if header.get(entry, "").startswith(beginning):
                return family
    flat = [key.replace(".", "_") for key in keys]
    for pattern, family in _SPELT.items():
        if any(re.match(pattern, key) for key in flat):
            return family
    return None


def _by_modules(names: Iterable[str]) -> Family | None:
    known = list(names)
    if any(_ONLY_XL.match(name) for name in known):
        return "sdxl"
    return "sd" if any(_ONLY_SD.match(name) for name in known) else None


def _by_width(pair: LoraPair) -> Family | None:
    """The family whose published model has a layer of this name and width; None for neither."""
    outputs, inputs = pair.up.shape[0], pair.down.shape[1]
    if pair.name.endswith(("attn2_to_k", "attn2_to_v")):
        return _TEXT_STATES.get(inputs)
    if _SKIP.match(pair.name):
        return _SKIP_INPUTS.get(inputs)
    found = _UP.match(pair.name)
    return _OUTPUTS.get((found[1], outputs)) if found else None
