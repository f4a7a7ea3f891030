"""Names and fused projections of flow transformers in their makers' own code.

Inside the toolkit, modules have diffusers' paths. Kohya's tools and ComfyUI use those of the
original code, where query, key and value are often one layer whose output rows follow one another.
Such a layer's pair is split exactly: each part has the whole `down` and its own rows of `up`. Parts
are fused exactly, too: their `down` are stacked and their `up` are the blocks of a diagonal.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rite_diffusion.adapters.adapter import Adapter
from rite_diffusion.adapters.names import PREFIXES, dotted, module_name, split_name
from rite_diffusion.errors import AdapterError
from rite_diffusion.types import LoraPair

# Where a number stands in a path; one native layer may be several of diffusers'.
_STREAMS = "to_q to_k to_v".split(), "add_q_proj add_k_proj add_v_proj".split()


def _fused(native: str, block: str, parts: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    return native, tuple(f"{block}.{part}" for part in parts)


_FLUX_DOUBLE, _FLUX_SINGLE = "transformer_blocks.#.attn", "single_transformer_blocks.#"
_FLUX_ATTENTION = [
    _fused("double_blocks.#.img_attn.qkv", _FLUX_DOUBLE, _STREAMS[0]),
    _fused("double_blocks.#.txt_attn.qkv", _FLUX_DOUBLE, _STREAMS[1]),
    ("double_blocks.#.img_attn.proj", (f"{_FLUX_DOUBLE}.to_out.0",)),
    ("double_blocks.#.txt_attn.proj", (f"{_FLUX_DOUBLE}.to_add_out",)),
]
_JOINT = "joint_blocks.#"
_Z_IMAGE = [
    entry
    for block in ("layers.#", "noise_refiner.#", "context_refiner.#")
    for entry in (
        _fused(f"{block}.attention.qkv", f"{block}.attention", _STREAMS[0]),
        (f"{block}.attention.out", (f"{block}.attention.to_out.0",)),
    )
]
_LUMINA = [
    entry
    for block in ("layers.#", "noise_refiner.#", "context_refiner.#")
    for entry in (
        _fused(f"{block}.attention.qkv", f"{block}.attn", _STREAMS[0]),
        (f"{block}.attention.out", (f"{block}.attn.to_out.0",)),
        *((f"{block}.feed_forward.w{i}", (f"{block}.feed_forward.linear_{i}",)) for i in (1, 2, 3)),
    )
]
_KREA_ATTENTION = {"wq": "to_q", "wk": "to_k", "wv": "to_v", "wo": "to_out.0", "gate": "to_gate"}
_KREA_BLOCKS = {
    "blocks.#": "transformer_blocks.#",
    "txtfusion.layerwise_blocks.#": "text_fusion.layerwise_blocks.#",
    "txtfusion.refiner_blocks.#": "text_fusion.refiner_blocks.#",
}
_KREA = [
    entry
    for native, block in _KREA_BLOCKS.items()
    for entry in (
        *((f"{native}.attn.{n}", (f"{block}.attn.{d}",)) for n, d in _KREA_ATTENTION.items()),
        *((f"{native}.mlp.{part}", (f"{block}.ff.{part}",)) for part in ("gate", "up", "down")),
    )
] + [
    ("first", ("img_in",)),
    ("last.linear", ("final_layer.linear",)),
    ("tmlp.0", ("time_embed.linear_1",)),
    ("tmlp.2", ("time_embed.linear_2",)),
    ("tproj.1", ("time_mod_proj",)),
    ("txtmlp.1", ("txt_in.linear_1",)),
    ("txtmlp.3", ("txt_in.linear_2",)),
    ("txtfusion.projector", ("text_fusion.projector",)),
]
# Family -> (path in the original code, diffusers' paths in the order of its output rows).
NATIVE: dict[str, list[tuple[str, tuple[str, ...]]]] = {
    "flux": [
        *_FLUX_ATTENTION,
        ("double_blocks.#.img_mlp.0", ("transformer_blocks.#.ff.net.0.proj",)),
        ("double_blocks.#.img_mlp.2", ("transformer_blocks.#.ff.net.2",)),
        ("double_blocks.#.txt_mlp.0", ("transformer_blocks.#.ff_context.net.0.proj",)),
        ("double_blocks.#.txt_mlp.2", ("transformer_blocks.#.ff_context.net.2",)),
        ("double_blocks.#.img_mod.lin", ("transformer_blocks.#.norm1.linear",)),
        ("double_blocks.#.txt_mod.lin", ("transformer_blocks.#.norm1_context.linear",)),
        _fused(
            "single_blocks.#.linear1",
            _FLUX_SINGLE,
            ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"],
        ),
        ("single_blocks.#.linear2", (f"{_FLUX_SINGLE}.proj_out",)),
        ("single_blocks.#.modulation.lin", (f"{_FLUX_SINGLE}.norm.linear",)),
        ("img_in", ("x_embedder",)),
        ("txt_in", ("context_embedder",)),
        ("final_layer.linear", ("proj_out",)),
    ],
    "flux2": [
        *_FLUX_ATTENTION,
        ("double_blocks.#.img_mlp.0", ("transformer_blocks.#.ff.linear_in",)),
        ("double_blocks.#.img_mlp.2", ("transformer_blocks.#.ff.linear_out",)),
        ("double_blocks.#.txt_mlp.0", ("transformer_blocks.#.ff_context.linear_in",)),
        ("double_blocks.#.txt_mlp.2", ("transformer_blocks.#.ff_context.linear_out",)),
        ("single_blocks.#.linear1", (f"{_FLUX_SINGLE}.attn.to_qkv_mlp_proj",)),
        ("single_blocks.#.linear2", (f"{_FLUX_SINGLE}.attn.to_out",)),
        ("img_in", ("x_embedder",)),
        ("txt_in", ("context_embedder",)),
        ("final_layer.linear", ("proj_out",)),
    ],
    "sd3": [
        _fused(f"{_JOINT}.x_block.attn.qkv", _FLUX_DOUBLE, _STREAMS[0]),
        _fused(f"{_JOINT}.context_block.attn.qkv", _FLUX_DOUBLE, _STREAMS[1]),
        _fused(f"{_JOINT}.x_block.attn2.qkv", "transformer_blocks.#.attn2", _STREAMS[0]),
        (f"{_JOINT}.x_block.attn.proj", (f"{_FLUX_DOUBLE}.to_out.0",)),
        (f"{_JOINT}.x_block.attn2.proj", ("transformer_blocks.#.attn2.to_out.0",)),
        (f"{_JOINT}.context_block.attn.proj", (f"{_FLUX_DOUBLE}.to_add_out",)),
        (f"{_JOINT}.x_block.mlp.fc1", ("transformer_blocks.#.ff.net.0.proj",)),
        (f"{_JOINT}.x_block.mlp.fc2", ("transformer_blocks.#.ff.net.2",)),
        (f"{_JOINT}.context_block.mlp.fc1", ("transformer_blocks.#.ff_context.net.0.proj",)),
        (f"{_JOINT}.context_block.mlp.fc2", ("transformer_blocks.#.ff_context.net.2",)),
    ],
    "z-image": _Z_IMAGE,
    "lumina2": _LUMINA,
    "krea2": _KREA,
    "qwen-image": [],  # its own code has diffusers' names
}
NATIVE["chroma"] = NATIVE["flux"]
_TRANSFORMER = PREFIXES["transformer"]
MLP_RATIO = 4  # outputs of FLUX.1's MLPs over their inputs


def _flat(path: str) -> str:
    return path.replace(".", "_")


@dataclass(frozen=True)
class _Rule:
    """A native layer and what it is in diffusers, both flat, with # for the block's number."""

    native: str
    parts: tuple[str, ...]

    def number(self, pattern: str, flat: str) -> str | None:
        """The block's number in a flat path of a pattern, "" of one without; None: no match."""
        found = re.fullmatch(pattern.replace("#", r"(\d+)"), flat)
        return None if found is None else found[1] if found.groups() else ""


_RULES = {
    family: [_Rule(_flat(native), tuple(map(_flat, parts))) for native, parts in entries]
    for family, entries in NATIVE.items()
}


# --- from the original names -------------------------------------------------------------------


def with_parts(pairs: Iterable[LoraPair], family: str) -> list[LoraPair]:
    """Pairs of a flow transformer by diffusers' names; fused layers are split."""
    found: dict[str, LoraPair] = {}
    for pair in pairs:
        for part in _parts(pair, family):
            if part.name in found:
                raise AdapterError(f"the file holds module {part.name} twice")
            found[part.name] = part
    return [found[name] for name in sorted(found)]


def _parts(pair: LoraPair, family: str) -> list[LoraPair]:
    component, flat = split_name(pair.name)
    if component != "transformer":
        return [pair]
    for rule in _RULES[family]:
        number = rule.number(rule.native, flat)
        if number is not None:
            names = [_TRANSFORMER + part.replace("#", number) for part in rule.parts]
            return _split(pair, names)
    return [pair]


def _split(pair: LoraPair, names: Sequence[str]) -> list[LoraPair]:
    """A fused pair's parts by name, in the order of its output rows; none for rows of zeros."""
    if len(names) == 1:
        return [LoraPair(names[0], pair.down, pair.up, pair.scale, pair.magnitude)]
    sizes = _rows(pair, len(names))
    norms = [None] * len(names) if pair.magnitude is None else pair.magnitude.split(sizes)
    parts = list(zip(names, pair.up.split(sizes), norms, strict=True))
    changed = [part for part in parts if part[1].any() or part[2] is not None] or parts
    ranks = _own_ranks([up for _, up, _ in changed])
    return [
        LoraPair(name, pair.down[rank].contiguous(), up[:, rank].contiguous(), pair.scale, norm)
        for (name, up, norm), rank in zip(changed, ranks, strict=True)
    ]


def _rows(pair: LoraPair, count: int) -> list[int]:
    """The output rows of q, k and v (and an MLP) in a fused layer.

    A query has as many rows as the layer has inputs. Keys and values share the rest where there
    are three parts; with an MLP as a fourth, all of attention is alike.
    """
    rows, width = pair.up.shape[0], pair.down.shape[1]
    if count == 4:
        sizes = [width, width, width, rows - 3 * width]
    else:
        sizes = [width, *[(rows - width) // 2] * 2]
    if sum(sizes) != rows or min(sizes) <= 0:
        raise AdapterError(
            f"{pair.name} has {rows} output rows for {width} inputs, which are no query, key and "
            "value"
        )
    return sizes


def _own_ranks(ups: Sequence[Tensor]) -> list[slice]:
    """The ranks that each part's rows of a fused `up` use: its own in a block-diagonal one."""
    used = [up.ne(0).any(0) for up in ups]
    overlap = torch.stack(used).sum(0)
    if (overlap > 1).any() or not all(each.any() for each in used):
        return [slice(None)] * len(ups)
    places = [each.nonzero()[:, 0] for each in used]
    edges = [(int(each[0]), int(each[-1]) + 1) for each in places]
    if any(one[1] > other[0] for one, other in zip(edges, edges[1:], strict=False)):
        return [slice(None)] * len(ups)
    return [slice(start, end) for start, end in edges]


# --- to the original names ---------------------------------------------------------------------


def by_native_name(pairs: Iterable[LoraPair], family: str) -> dict[str, LoraPair]:
    """Dotted original path -> the pair there; parts of a fused layer are fused.

    AdapterError where a fused layer has too few of its parts to tell the others' sizes.
    """
    if family not in NATIVE:
        raise AdapterError(f"the names of {family or 'an unknown family'} are not known")
    own = {split_name(pair.name)[1]: pair for pair in pairs}
    result: dict[str, LoraPair] = {}
    for (native, _), rule in zip(NATIVE[family], _RULES[family], strict=True):
        numbers = {
            number
            for part in rule.parts
            for flat in own
            if (number := rule.number(part, flat)) is not None
        }
        for number in sorted(numbers, key=lambda each: int(each or 0)):
            names = [part.replace("#", number) for part in rule.parts]
            parts = [own.pop(name, None) for name in names]
            path = native.replace("#", number)
            result[path] = _fuse(path, parts)
    return result | {dotted(flat): pair for flat, pair in own.items()}


def _fuse(path: str, parts: Sequence[LoraPair | None]) -> LoraPair:
    """One pair of the parts' pairs; a part that is missing has zero rows."""
    there = [part for part in parts if part is not None]
    if len(parts) == 1:
        return there[0]
    if any(part.magnitude is not None for part in there) and len(there) < len(parts):
        raise AdapterError(f"{path} needs DoRA norms of all its parts: convert to diffusers")
    sizes = _part_rows(path, parts)
    ranks = [0 if part is None else part.rank for part in parts]
    up = there[0].up.new_zeros(sum(sizes), sum(ranks))
    row = column = 0
    for part, size, rank in zip(parts, sizes, ranks, strict=True):
        if part is not None:
            up[row : row + size, column : column + rank] = part.up * part.scale
        row, column = row + size, column + rank
    norms = [part.magnitude for part in there if part.magnitude is not None]
    down = torch.cat([part.down for part in there])
    return LoraPair(path, down, up, 1.0, torch.cat(norms) if norms else None)


def _part_rows(path: str, parts: Sequence[LoraPair | None]) -> list[int]:
    """The output rows of each part of a fused layer, of missing ones too."""
    rows = [None if part is None else part.up.shape[0] for part in parts]
    width = next(part.down.shape[1] for part in parts if part is not None)
    rows[0] = rows[0] or width
    rows[1] = rows[1] or rows[2] or (width if len(parts) == 4 else None)
    rows[2] = rows[2] or rows[1]
    if len(parts) == 4:
        rows[3] = rows[3] or MLP_RATIO * width
    if any(size is None for size in rows):
        raise AdapterError(
            f"{path} is one layer there, and the adapter has too few of its parts to tell the "
            "sizes of the others: convert to diffusers"
        )
    return [size for size in rows if size is not None]


# --- which family ------------------------------------------------------------------------------

_ROOTS = re.compile(
    r"(double_blocks|single_blocks|joint_blocks|layers|noise_refiner|context_refiner|blocks|"
    r"transformer_blocks|single_transformer_blocks|txtfusion_\w+_blocks)_\d+_|"
    r"(img_in|txt_in|x_embedder|context_embedder|first|last_linear|final_layer_linear|tmlp_\d|"
    r"tproj_1|txtmlp_\d|txtfusion_projector|time_mod_proj|text_fusion_\w+)$"
)
# Names, flat, that one family alone has.
_MARKS = {
    r"layers_\d+_attn_|.*feed_forward_linear_\d": "lumina2",
    r"layers_\d+_attention_to_": "z-image",
    r"joint_blocks_|transformer_blocks_\d+_attn2_": "sd3",
    r"blocks_\d+_(attn_w[qkvo]|mlp_(gate|up|down))|transformer_blocks_\d+_(ff_gate|attn_to_gate)|"
    r"txtfusion|text_fusion": "krea2",
    r"transformer_blocks_\d+_(img|txt)_(mlp|mod)": "qwen-image",
    r"single_transformer_blocks_\d+_attn_(to_qkv_mlp_proj|to_out$)|"
    r"transformer_blocks_\d+_ff(_context)?_linear_(in|out)": "flux2",
    r"single_transformer_blocks_\d+_(proj_mlp|proj_out|attn_to_[qkv]$)|"
    r"transformer_blocks_\d+_norm1(_context)?_linear|double_blocks_\d+_(img|txt)_mod_lin|"
    r"single_blocks_\d+_modulation_lin": "flux",
}


def is_of_flow(flat: str) -> bool:
    """Whether a flat path is a flow transformer's, by its beginning."""
    return _ROOTS.match(flat) is not None


def flow_name(name: str) -> str:
    """The name of a module that a file calls a UNet's, where it is a flow transformer's."""
    prefix = PREFIXES["unet"]
    flat = name.removeprefix(prefix)
    return module_name("transformer", flat) if name != flat and is_of_flow(flat) else name


def known_family(adapter: Adapter) -> str:
    """The family of a flow transformer's adapter; AdapterError where nothing tells."""
    found = adapter.info.family if adapter.info.family in NATIVE else flow_family(adapter.pairs)
    if not found:
        raise AdapterError(
            "the file does not state its base model, and its modules are in several families: "
            "pass it with --base"
        )
    return found


def flow_family(pairs: Iterable[LoraPair]) -> str:
    """The family whose transformer has modules of these names and sizes, "" where several have."""
    named = {split_name(pair.name)[1]: pair for pair in pairs}
    for pattern, family in _MARKS.items():
        if any(re.match(pattern, flat) for flat in named):
            return family
    for flat, pair in named.items():
        share = pair.up.shape[0] / pair.down.shape[1]
        if re.fullmatch(r"single_blocks_\d+_linear1", flat):
            return "flux" if share == 7 else "flux2"
        if re.fullmatch(r"double_blocks_\d+_(img|txt)_mlp_0", flat):
            return "flux" if share == 4 else "flux2"
        if re.fullmatch(r"layers_\d+_attention_qkv", flat):
            return "z-image" if share == 3 else "lumina2"
    if any(flat.startswith("double_blocks_") for flat in named):
        return "flux"  # attention alone, which FLUX.2 names alike
    if any(flat.startswith("layers_") for flat in named):
        return "z-image"
    return ""
