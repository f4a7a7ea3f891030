"""Where other tools look for a flow transformer's layers: one written map per family.

`native` rewrites the names of a file. This map goes the other way, from each of diffusers' layers
to the layer of the original code and the rows in it, and verifies exports independently.
"""

from collections.abc import Iterable, Mapping

from torch import Tensor

from rite_diffusion.errors import AdapterError
from rite_diffusion.types import LoraPair

Place = tuple[str, int]  # original path, and which of its parts, counted by output rows

_FLUX_DOUBLE: dict[str, Place] = {
    "attn.to_q": ("img_attn.qkv", 0),
    "attn.to_k": ("img_attn.qkv", 1),
    "attn.to_v": ("img_attn.qkv", 2),
    "attn.to_out.0": ("img_attn.proj", 0),
    "attn.add_q_proj": ("txt_attn.qkv", 0),
    "attn.add_k_proj": ("txt_attn.qkv", 1),
    "attn.add_v_proj": ("txt_attn.qkv", 2),
    "attn.to_add_out": ("txt_attn.proj", 0),
}
_FLUX: dict[str, dict[str, Place]] = {
    "transformer_blocks": _FLUX_DOUBLE
    | {
        "ff.net.0.proj": ("img_mlp.0", 0),
        "ff.net.2": ("img_mlp.2", 0),
        "ff_context.net.0.proj": ("txt_mlp.0", 0),
        "ff_context.net.2": ("txt_mlp.2", 0),
    },
    "single_transformer_blocks": {
        "attn.to_q": ("linear1", 0),
        "attn.to_k": ("linear1", 1),
        "attn.to_v": ("linear1", 2),
        "proj_mlp": ("linear1", 3),
        "proj_out": ("linear2", 0),
    },
}
_LAYERS: dict[str, dict[str, dict[str, Place]]] = {
    "flux": _FLUX,
    "chroma": _FLUX,
    "flux2": {
        "transformer_blocks": _FLUX_DOUBLE
        | {
            "ff.linear_in": ("img_mlp.0", 0),
            "ff.linear_out": ("img_mlp.2", 0),
            "ff_context.linear_in": ("txt_mlp.0", 0),
            "ff_context.linear_out": ("txt_mlp.2", 0),
        },
        "single_transformer_blocks": {
            "attn.to_qkv_mlp_proj": ("linear1", 0),
            "attn.to_out": ("linear2", 0),
        },
    },
    "sd3": {
        "transformer_blocks": {
            "attn.to_q": ("x_block.attn.qkv", 0),
            "attn.to_k": ("x_block.attn.qkv", 1),
            "attn.to_v": ("x_block.attn.qkv", 2),
            "attn.to_out.0": ("x_block.attn.proj", 0),
            "attn2.to_q": ("x_block.attn2.qkv", 0),
            "attn2.to_k": ("x_block.attn2.qkv", 1),
            "attn2.to_v": ("x_block.attn2.qkv", 2),
            "attn2.to_out.0": ("x_block.attn2.proj", 0),
            "attn.add_q_proj": ("context_block.attn.qkv", 0),
            "attn.add_k_proj": ("context_block.attn.qkv", 1),
            "attn.add_v_proj": ("context_block.attn.qkv", 2),
            "attn.to_add_out": ("context_block.attn.proj", 0),
            "ff.net.0.proj": ("x_block.mlp.fc1", 0),
            "ff.net.2": ("x_block.mlp.fc2", 0),
            "ff_context.net.0.proj": ("context_block.mlp.fc1", 0),
            "ff_context.net.2": ("context_block.mlp.fc2", 0),
        }
    },
    "z-image": {
        "layers": {
            "attention.to_q": ("attention.qkv", 0),
            "attention.to_k": ("attention.qkv", 1),
            "attention.to_v": ("attention.qkv", 2),
            "attention.to_out.0": ("attention.out", 0),
            "feed_forward.w1": ("feed_forward.w1", 0),
            "feed_forward.w2": ("feed_forward.w2", 0),
            "feed_forward.w3": ("feed_forward.w3", 0),
        }
    },
    "lumina2": {
        "layers": {
            "attn.to_q": ("attention.qkv", 0),
            "attn.to_k": ("attention.qkv", 1),
            "attn.to_v": ("attention.qkv", 2),
            "attn.to_out.0": ("attention.out", 0),
            "feed_forward.linear_1": ("feed_forward.w1", 0),
            "feed_forward.linear_2": ("feed_forward.w2", 0),
            "feed_forward.linear_3": ("feed_forward.w3", 0),
        }
    },
    "krea2": {
        "transformer_blocks": {
            "attn.to_q": ("attn.wq", 0),
            "attn.to_k": ("attn.wk", 0),
            "attn.to_v": ("attn.wv", 0),
            "attn.to_out.0": ("attn.wo", 0),
            "attn.to_gate": ("attn.gate", 0),
            "ff.gate": ("mlp.gate", 0),
            "ff.up": ("mlp.up", 0),
            "ff.down": ("mlp.down", 0),
        }
    },
    "qwen-image": {
        "transformer_blocks": {
            name: (name, 0)
            for name in (
                *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
                *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
                *("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"),
            )
        }
    },
}
_BLOCKS = {
    "flux": {"transformer_blocks": "double_blocks", "single_transformer_blocks": "single_blocks"},
    "sd3": {"transformer_blocks": "joint_blocks"},
    "krea2": {"transformer_blocks": "blocks"},
}
_BLOCKS["chroma"] = _BLOCKS["flux2"] = _BLOCKS["flux"]


def original_place(family: str, path: str) -> Place | None:
    """Where the original code has a layer of diffusers' path; None for layers not in the map."""
    block, _, rest = path.partition(".")
    number, _, layer = rest.partition(".")
    place = _LAYERS[family].get(block, {}).get(layer)
    if place is None:
        return None
    return f"{_BLOCKS.get(family, {}).get(block, block)}.{number}.{place[0]}", place[1]


def read_original(
    tensors: Mapping[str, Tensor], family: str, target: str, pairs: Iterable[tuple[str, LoraPair]]
) -> dict[str, Tensor]:
    """Diffusers' path -> delta W that a tool reads for that layer from an export's tensors.

    `pairs` are the adapter's, by diffusers' path: they give the sizes of the parts of fused layers.
    AdapterError where a tensor is looked up by nobody.
    """
    known = list(pairs)
    used: set[str] = set()
    result = {}
    for path, _ in known:
        place = (path, 0) if target == "diffusers" else original_place(family, path)
        if place is None:
            raise AdapterError(f"{target} has no known name for {path}: convert to diffusers")
        stem = _stem(place[0], target)
        keys = _keys(stem, tensors)
        used |= keys.keys() | {f"{stem}.alpha"}
        down, up = keys.values()
        alpha = tensors.get(f"{stem}.alpha")
        whole = up.float() @ down.float() * (1.0 if alpha is None else float(alpha) / len(down))
        is_whole = target == "diffusers"
        result[path] = whole if is_whole else whole[_rows(family, place, known, len(whole))]
    unread = sorted(set(tensors) - used - {key for key in tensors if "magnitude" in key})
    unread = [key for key in unread if not key.endswith(".dora_scale")]
    if unread:
        raise AdapterError(f"{target} looks up none of {len(unread)} tensors (first: {unread[0]})")
    return result


def _stem(path: str, target: str) -> str:
    """The stem that a tool looks up for a path."""
    if target == "kohya":
        return f"lora_unet_{path.replace('.', '_')}"
    return f"diffusion_model.{path}" if target == "comfyui" else f"transformer.{path}"


def _keys(stem: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The factors of a stem by name, down first."""
    for ends in ((".lora_down.weight", ".lora_up.weight"), (".lora_A.weight", ".lora_B.weight")):
        if stem + ends[0] in tensors:
            return {stem + end: tensors[stem + end] for end in ends}
    raise AdapterError(f"the export has no {stem}")


def _rows(family: str, place: Place, pairs: Iterable[tuple[str, LoraPair]], total: int) -> slice:
    """The rows of one part in a fused layer, from the sizes of the parts before it."""
    sizes = {
        found[1]: pair.up.shape[0]
        for path, pair in pairs
        if (found := original_place(family, path)) is not None and found[0] == place[0]
    }
    missing = [part for part in range(place[1]) if part not in sizes]
    before = sum(size for part, size in sizes.items() if part < place[1])
    if missing:  # parts without an update; the last part ends where the layer does
        after = sum(size for part, size in sizes.items() if part >= place[1])
        before = total - after
    return slice(before, before + sizes[place[1]])
