"""Which layout an adapter's base has: what other tools call its modules depends on it.

Stable Diffusion 1 and 2 have four levels, XL has three; many modules are called alike in both. What
tells them apart is, in this order: modules that one of them alone has, what the header or the
spelling of names in a file says, and the published models' widths.
"""

import re
from collections.abc import Iterable, Mapping

from rite_diffusion.adapters.adapter import Adapter
from rite_diffusion.adapters.names import Family
from rite_diffusion.backbones.protocols import Backbone
from rite_diffusion.types import LoraPair

_ONLY_XL = re.compile(r"lora_te2_|lora_unet_(add_embedding_|.*_transformer_blocks_[1-9])")
_ONLY_SD = re.compile(
    r"lora_unet_(down_blocks_(3|0_attentions|2_downsamplers)|up_blocks_(3|2_attentions|2_upsampl))"
)
# Entries of kohya's and of ModelSpec's headers, and how their values begin.
_STATED_OURS: dict[str, Family] = {"sd": "sd", "sdxl": "sdxl"}
_STATED: dict[str, dict[str, Family]] = {
    "ss_base_model_version": {"sdxl": "sdxl", "sd_v": "sd", "sd_1": "sd", "sd_2": "sd"},
    "modelspec.architecture": {"stable-diffusion-xl": "sdxl", "stable-diffusion-v": "sd"},
}
# Keys with dots as underscores. Kohya spells SDXL's UNet as Stability's code does, and no other.
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
    """The layout that an adapter's base has; None where nothing tells."""
    found = _STATED_OURS.get(adapter.info.family) or _by_modules(adapter.modules())
    if found is not None:
        return found
    return next((family for pair in adapter.pairs if (family := _by_width(pair))), None)


def family_of_base(backbone: Backbone) -> Family:
    """The layout of a base model."""
    return "sdxl" if "text_encoder_2" in backbone.components else "sd"


def family_of_file(header: Mapping[str, str], keys: Iterable[str]) -> Family | None:
    """What a file's header, else the spelling of its tensors' names, says of its base."""
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
    """The family whose published model has a layer of this name and these inputs or outputs."""
    outputs, inputs = pair.up.shape[0], pair.down.shape[1]
    if pair.name.endswith(("attn2_to_k", "attn2_to_v")):
        return _TEXT_STATES.get(inputs)
    if _SKIP.match(pair.name):
        return _SKIP_INPUTS.get(inputs)
    found = _UP.match(pair.name)
    return _OUTPUTS.get((found[1], outputs)) if found else None
