"""Adapters of kinds that are not read: recognised by tensor names, with what a user can do."""

import re
from collections.abc import Collection

_MERGE = "merge it into its base with the tool that made it and pass that as --base"
_OTHER_BASE = "this toolkit adapts denoisers and text encoders"

# Pattern of a tensor's name -> what it is, and the remedy.
_KINDS = {
    r"\.(oft_|boft_)": ("OFT or BOFT, which rotates weights instead of adding to them", _MERGE),
    r"\.(a1|a2|b1|b2|bm)\.weight$": ("GLoRA, which multiplies weights too", _MERGE),
    r"(\.on_input|\.ia3_l)": ("IA3, which multiplies weights", _MERGE),
    r"\.?vera_": ("VeRA, whose random factors are not in the file", _MERGE),
    r"\.(lora_E|ranknum)": ("AdaLoRA", "PEFT's `convert_to_lora` makes a LoRA of it"),
    r"\.(lambda_layer|[pq]_layer\.weight)$": ("T-LoRA, whose rank changes with time", _MERGE),
    r"fourierft_": ("FourierFT", "PEFT's `convert_to_lora` makes a LoRA of it"),
    r"\.lora_embedding_[AB]|token_adapter": ("rows of an embedding table", _MERGE),
    r"\.(set_weight|reshape_weight)$": ("weights that replace the base's", _MERGE),
    r"_custom_diffusion": (
        "whole weights of Custom Diffusion",
        "convert it with `rite convert FILE --published-pickle --base BASE`",
    ),
    r"^lora_(controlnet|unet_lllite)|controlnet|lllite": ("of a ControlNet", _OTHER_BASE),
    r"^(text_encoder_3\.|lora_te3)|t5xxl": (
        "of a T5 text encoder",
        "this toolkit adapts denoisers and CLIP's text encoders",
    ),
    r"^(model\.diffusion_model|cond_stage_model|first_stage_model)\.": (
        "a whole model, not an adapter",
        "pass it as --base",
    ),
}


def describe(unknown: Collection[str]) -> str:
    """A sentence with the kind of the unknown tensors and a remedy; empty where none matches."""
    for pattern, (kind, remedy) in _KINDS.items():
        if any(re.search(pattern, key) for key in unknown):
            return f" It looks like {kind}: {remedy}"
    return ""
