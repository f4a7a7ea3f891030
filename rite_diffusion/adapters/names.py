"""Names of a model's modules in adapter files.

Inside the toolkit a module's name is `<component's prefix><diffusers path, dots as underscores>`,
the same for every model: `lora_unet_down_blocks_1_attentions_0_…_to_q`, `lora_te2_text_model_…`.
Other tools' files have other names; SDXL files use the UNet's names in Stability's own code
("SGM"): `input_blocks_4_1_…`. Every Stable Diffusion has two residual blocks per level, so a level
has three input blocks and three output blocks.
"""

import re
from typing import Literal

from rite_diffusion.errors import AdapterError

PREFIXES = {
    "unet": "lora_unet_",
    "text_encoder": "lora_te_",
    "text_encoder_2": "lora_te2_",
    "transformer": "lora_transformer_",
}

Family = Literal["sd", "sdxl"]

# Parts of a path with an underscore in them, and parts without.
_LONG = """add_embedding conv_in conv_norm_out conv_out conv_shortcut down_blocks emb_layers
final_layer_norm in_layers input_blocks k_proj label_emb layer_norm1 layer_norm2 linear_1 linear_2
mid_block middle_block out_layers out_proj output_blocks position_embedding proj_in proj_out
q_proj self_attn skip_connection text_model text_projection time_emb_proj time_embed
time_embedding to_k to_out to_q to_v token_embedding transformer_blocks up_blocks v_proj""".split()
# The same of flow transformers.
_LONG += """adaLN_modulation add_k_proj add_q_proj add_v_proj all_final_layer all_x_embedder
cap_embedder context_embedder context_refiner feed_forward ff_context final_layer img_in img_mlp
img_mod layerwise_blocks linear_3 linear_in linear_out noise_refiner norm1_context norm_out
proj_mlp refiner_blocks single_transformer_blocks t_embedder text_embedder text_fusion time_embed
time_mod_proj time_text_embed timestep_embedder to_add_out to_gate to_qkv_mlp_proj txt_in txt_mlp
txt_mod x_embedder""".split()
_SHORT = """attentions attn1 attn2 conv conv1 conv2 downsamplers embeddings encoder fc1 fc2 ff
layers mlp net norm norm1 norm2 norm3 op out proj resnets upsamplers""".split()
_SHORT += "attention attn down gate linear projector up w1 w2 w3 2-1".split()
_PARTS = sorted({*_LONG, *_SHORT}, key=len, reverse=True)
_WORD = re.compile(rf"(?:{'|'.join(_PARTS)}|\d+)(?=_|$)")

_RESNET = {
    "norm1": "in_layers_0",
    "conv1": "in_layers_2",
    "time_emb_proj": "emb_layers_1",
    "norm2": "out_layers_0",
    "conv2": "out_layers_3",
    "conv_shortcut": "skip_connection",
}
_STEMS = {
    "conv_in": "input_blocks_0_0",
    "conv_norm_out": "out_0",
    "conv_out": "out_2",
    "time_embedding_linear_1": "time_embed_0",
    "time_embedding_linear_2": "time_embed_2",
    "add_embedding_linear_1": "label_emb_0_0",
    "add_embedding_linear_2": "label_emb_0_2",
}
_FROM_RESNET = {theirs: ours for ours, theirs in _RESNET.items()}
_FROM_STEMS = {theirs: ours for ours, theirs in _STEMS.items()}


def module_name(component: str, path: str) -> str:
    """The toolkit's name of a component's module at a path, dotted or flat.

    transformers >= 5.6 dropped the level `text_model` from CLIP's paths; names keep it.
    """
    flat = path.replace(".", "_")
    if component.startswith("text") and flat.startswith(
        ("encoder_", "embeddings_", "final_layer_norm")
    ):
        flat = f"text_model_{flat}"
    return PREFIXES[component] + flat


def split_name(name: str) -> tuple[str, str]:
    """Component and flat path of a module's name."""
    for component, prefix in PREFIXES.items():
        if name.startswith(prefix):
            return component, name.removeprefix(prefix)
    raise AdapterError(f"module '{name}' belongs to no component of a base model")


def split_path(name: str) -> tuple[str, str]:
    """Component and dotted path of a module's name."""
    component, flat = split_name(name)
    return component, dotted(flat)


def dotted(flat: str) -> str:
    """The dotted path of a flat one; AdapterError where a part is of no known base model."""
    path = ".".join(_WORD.findall(flat))
    if path.replace(".", "_") != flat:
        raise AdapterError(
            f"'{flat}' is not a module of a known base model, so its path is unknown"
        )
    return path


def to_sgm(flat: str, family: Family) -> str:
    """The flat SGM name of a UNet module; a name without a counterpart is returned as it is."""
    if flat in _STEMS:
        return _STEMS[flat]
    if found := re.fullmatch(r"mid_block_(resnets|attentions)_(\d)_(.+)", flat):
        place = 1 if found[1] == "attentions" else 2 * int(found[2])
        return f"middle_block_{place}_{_RESNET.get(found[3], found[3])}"
    if found := re.fullmatch(r"(down|up)_blocks_(\d)_(resnets|attentions)_(\d)_(.+)", flat):
        index = 3 * int(found[2]) + int(found[4])
        block = f"input_blocks_{index + 1}" if found[1] == "down" else f"output_blocks_{index}"
        inner = _RESNET.get(found[5], found[5])
        return f"{block}_{0 if found[3] == 'resnets' else 1}_{inner}"
    if found := re.fullmatch(r"down_blocks_(\d)_downsamplers_0_conv", flat):
        return f"input_blocks_{3 * int(found[1]) + 3}_0_op"
    if found := re.fullmatch(r"up_blocks_(\d)_upsamplers_0_conv", flat):
        attends = family == "sdxl" or found[1] != "0"  # SD's lowest level has no attention
        return f"output_blocks_{3 * int(found[1]) + 2}_{2 if attends else 1}_conv"
    return flat


def from_sgm(flat: str) -> str:
    """The flat diffusers name of a UNet module named as in SGM; other names stay as they are."""
    if flat in _FROM_STEMS:
        return _FROM_STEMS[flat]
    if found := re.fullmatch(r"middle_block_([012])_(.+)", flat):
        place = int(found[1])
        kind = "attentions_0" if place == 1 else f"resnets_{place // 2}"
        return f"mid_block_{kind}_{_FROM_RESNET.get(found[2], found[2])}"
    if found := re.fullmatch(r"input_blocks_(\d+)_0_op", flat):
        return f"down_blocks_{int(found[1]) // 3 - 1}_downsamplers_0_conv"
    if found := re.fullmatch(r"output_blocks_(\d+)_[12]_conv", flat):
        return f"up_blocks_{int(found[1]) // 3}_upsamplers_0_conv"
    if found := re.fullmatch(r"(input|output)_blocks_(\d+)_([01])_(.+)", flat):
        index = int(found[2]) - (1 if found[1] == "input" else 0)
        block = f"{'down' if found[1] == 'input' else 'up'}_blocks_{index // 3}"
        kind = "resnets" if found[3] == "0" else "attentions"
        return f"{block}_{kind}_{index % 3}_{_FROM_RESNET.get(found[4], found[4])}"
    return flat
