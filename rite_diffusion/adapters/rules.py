"""The tensor names that other tools look up, derived from a model's layers.

The dialects parse the names in a file. These maps go the other way: for each layer of a model they
give the name that the tool looks up. Exports are verified with them, independently of the dialect.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from rite_diffusion.adapters.names import Family
from rite_diffusion.types import LoraPair

# (component, dotted path as in diffusers; paths in CLIP include the level `text_model`)
Layer = tuple[str, str]

VECTORS = {".w_norm": "weight", ".b_norm": "bias", ".diff_b": "bias"}
_LEVELS = {"sd": (1, 1, 1, 0), "sdxl": (0, 2, 10)}  # transformer blocks in each level of the UNet
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_TRANSFORMER = [
    *(f"attn{i}.{p}" for i in (1, 2) for p in ("to_q", "to_k", "to_v", "to_out.0")),
    "ff.net.0.proj",
    "ff.net.2",
    "norm1",
    "norm2",
    "norm3",
]
_CLIP = [
    *(f"self_attn.{p}_proj" for p in ("q", "k", "v", "out")),
    *("mlp.fc1", "mlp.fc2", "layer_norm1", "layer_norm2"),
]
_CLIP_LAYERS = 32  # of the largest text encoder


def sgm_paths(family: Family) -> dict[str, str]:
    """Diffusers path -> path in Stability's own code (SGM), for every layer of a UNet."""
    levels = _LEVELS[family]
    paths = dict(_ends(family))
    block = 1  # input block 0 is conv_in
    for level, depth in enumerate(levels):
        for place in (0, 1):
            paths |= _block(f"down_blocks.{level}", place, f"input_blocks.{block}", depth)
            block += 1
        if level < len(levels) - 1:
            paths[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{block}.0.op"
            block += 1
    paths |= _renamed("mid_block.resnets.0", "middle_block.0", _RESNET.items())
    paths |= _transformers("mid_block.attentions.0", "middle_block.1", max(levels[-1], 1))
    paths |= _renamed("mid_block.resnets.1", "middle_block.2", _RESNET.items())
    block = 0
    for level, depth in enumerate(reversed(levels)):
        for place in (0, 1, 2):
            paths |= _block(f"up_blocks.{level}", place, f"output_blocks.{block}", depth)
            if place == 2 and level < len(levels) - 1:
                after = 2 if depth else 1
                upsampler = f"up_blocks.{level}.upsamplers.0.conv"
                paths[upsampler] = f"output_blocks.{block}.{after}.conv"
            block += 1
    return paths


def _ends(family: Family) -> Iterator[tuple[str, str]]:
    yield "conv_in", "input_blocks.0.0"
    yield "conv_norm_out", "out.0"
    yield "conv_out", "out.2"
    for place, sgm in ((1, 0), (2, 2)):
        yield f"time_embedding.linear_{place}", f"time_embed.{sgm}"
        if family == "sdxl":
            yield f"add_embedding.linear_{place}", f"label_emb.0.{sgm}"


def _block(start: str, place: int, sgm: str, depth: int) -> dict[str, str]:
    resnet = _renamed(f"{start}.resnets.{place}", f"{sgm}.0", _RESNET.items())
    return resnet | (
        _transformers(f"{start}.attentions.{place}", f"{sgm}.1", depth) if depth else {}
    )


def _transformers(start: str, sgm: str, depth: int) -> dict[str, str]:
    inner = ["norm", "proj_in", "proj_out"]
    inner += [f"transformer_blocks.{i}.{layer}" for i in range(depth) for layer in _TRANSFORMER]
    return _renamed(start, sgm, ((name, name) for name in inner))


def _renamed(start: str, sgm: str, names: Iterable[tuple[str, str]]) -> dict[str, str]:
    return {f"{start}.{ours}": f"{sgm}.{theirs}" for ours, theirs in names}


def published_layers(family: Family) -> list[Layer]:
    """The layers of the published Stable Diffusion 1 and 2, or of SDXL."""
    unet = [("unet", path) for path in sgm_paths(family)]
    encoders = ["text_encoder", "text_encoder_2"] if family == "sdxl" else ["text_encoder"]
    clip = [
        (encoder, f"text_model.encoder.layers.{i}.{layer}")
        for encoder in encoders
        for i in range(_CLIP_LAYERS)
        for layer in _CLIP
    ]
    ends = [(encoder, "text_model.final_layer_norm") for encoder in encoders]
    ends += [("text_encoder_2", "text_projection")] if family == "sdxl" else []
    return [*unet, *clip, *ends]


def kohya_map(layers: Iterable[Layer], family: Family) -> dict[str, Layer]:
    """Stem -> layer, for the stems that kohya's tools look up."""
    sgm = sgm_paths(family) if family == "sdxl" else {}
    prefixes = {"unet": "lora_unet", "text_encoder": "lora_te", "text_encoder_2": "lora_te2"}
    if family == "sdxl":
        prefixes["text_encoder"] = "lora_te1"
    return {
        f"{prefixes[component]}_{sgm.get(path, path)}".replace(".", "_"): (component, path)
        for component, path in layers
    }


def comfyui_map(layers: Iterable[Layer], family: Family) -> dict[str, Layer]:
    """Stem -> layer, for the stems that ComfyUI looks up; some layers have several."""
    sgm = sgm_paths(family)
    known = {}
    for component, path in layers:
        flat = path.replace(".", "_")
        if component == "unet" and path in sgm:
            for stem in (
                f"diffusion_model.{sgm[path]}",
                f"lora_unet_{sgm[path].replace('.', '_')}",
                f"lora_unet_{flat}",
                f"lycoris_{flat}",
            ):
                known[stem] = component, path
        elif component == "text_encoder":
            known[f"lora_te_{flat}"] = known[f"lora_te1_{flat}"] = component, path
        elif component == "text_encoder_2":
            known[f"lora_te2_{flat}"] = component, path
    return known


def diffusers_map(layers: Iterable[Layer], family: Family) -> dict[str, Layer]:
    """Stem -> layer, for the stems that diffusers looks up."""
    return {f"{component}.{path}": (component, path) for component, path in layers}


@dataclass(frozen=True)
class Reading:
    """What a tool reads from a file, by layer."""

    pairs: dict[Layer, LoraPair]
    vectors: dict[tuple[Layer, str], Tensor]  # (layer, "weight" or "bias") -> difference
    skipped: list[str]  # names of tensors that match no layer


def read_by_map(tensors: Mapping[str, Tensor], known: Mapping[str, Layer]) -> Reading:
    """What a tool with this map reads from a file; alpha counts only as a tensor."""
    found, vectors, used = {}, {}, set()
    for stem, layer in known.items():
        for down, up, vector in (
            (".lora_down.weight", ".lora_up.weight", ".dora_scale"),
            (".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"),
        ):
            if stem + down in tensors and stem + up in tensors:
                keys = [stem + each for each in (down, up, vector, ".alpha")]
                used |= set(keys)
                a, b, norms, alpha = (tensors.get(key) for key in keys)
                assert a is not None and b is not None
                scale = 1.0 if alpha is None else float(alpha) / len(a)
                magnitude = None if norms is None else norms.flatten()
                found[layer] = LoraPair(".".join(layer), a, b, scale, magnitude)
        for suffix, parameter in VECTORS.items():
            if stem + suffix in tensors:
                used.add(stem + suffix)
                vectors[layer, parameter] = tensors[stem + suffix]
    return Reading(found, vectors, sorted(tensors.keys() - used))
