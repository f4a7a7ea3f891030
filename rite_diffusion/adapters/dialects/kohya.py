"""Kohya's names, which ComfyUI, A1111 and diffusers read; the toolkit's own file uses them.

    lora_unet_<path>.lora_down.weight   (rank, in) or (rank, in, k, k)
    lora_unet_<path>.lora_up.weight     (out, rank) or (out, rank, 1, 1)
    lora_unet_<path>.alpha              scalar; delta W = alpha / rank * up @ down
    lora_unet_<path>.dora_scale         (out, 1), only where the layer is a DoRA
    lora_unet_<path>.w_norm, .b_norm    differences of a norm's weight and bias (LyCORIS)
    lora_unet_<path>.diff_b             difference of any other bias

Text encoders are `lora_te_` (SD1, SD2) or `lora_te1_` and `lora_te2_` (SDXL). The UNet's paths are
diffusers' for SD1 and SD2, SGM's for SDXL. The alpha of an rsLoRA is such that alpha / rank is its
scale.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from rite_diffusion.adapters import lycoris
from rite_diffusion.adapters.adapter import Adapter, metadata_of
from rite_diffusion.adapters.families import family_of
from rite_diffusion.adapters.names import (
    PREFIXES,
    Family,
    from_sgm,
    module_name,
    split_name,
    to_sgm,
)
from rite_diffusion.adapters.native import by_native_name, known_family
from rite_diffusion.adapters.storage import write_tensors
from rite_diffusion.types import LoraPair, Shift

_COMPONENTS = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
}
_VERSIONS = {768: "sd_v1", 1024: "sd_v2", 2048: "sdxl_base_v1-0"}  # by width of the text states
_ARCHITECTURES = {768: "stable-diffusion-v1/lora", 2048: "stable-diffusion-xl-v1-base/lora"}


def module_of(stem: str) -> str | None:
    """The toolkit's name of a module; None where the stem is not kohya's."""
    for prefix, component in _COMPONENTS.items():
        if stem.startswith(prefix) and "." not in stem:
            flat = stem.removeprefix(prefix)
            return module_name(component, from_sgm(flat) if component == "unet" else flat)
    return None


def stem_of(name: str, family: Family) -> str:
    """The stem that kohya uses for a module."""
    component, flat = split_name(name)
    if family == "sd":
        return name
    if component == "unet":
        return PREFIXES["unet"] + to_sgm(flat, family)
    return name.replace(PREFIXES["text_encoder"], "lora_te1_")


def pair_tensors(stem: str, pair: LoraPair) -> Iterator[tuple[str, Tensor]]:
    """Names with kohya's suffixes, and tensors, of a pair."""
    yield f"{stem}.lora_down.weight", pair.down
    yield f"{stem}.lora_up.weight", pair.up
    yield f"{stem}.alpha", torch.tensor(pair.scale * pair.rank)
    if pair.magnitude is not None:
        yield f"{stem}.dora_scale", pair.magnitude.reshape(-1, *[1] * (pair.down.ndim - 1))


def of_one_alpha(pairs: Sequence[LoraPair]) -> list[LoraPair]:
    """Pairs with the same updates and one alpha per component; `up` is multiplied accordingly.

    Where alphas differ within a UNet, diffusers 0.42 uses the most frequent one for all.
    """
    alphas = defaultdict(Counter)
    for pair in pairs:
        alphas[split_name(pair.name)[0]][pair.scale * pair.rank] += 1
    return [_with_alpha(pair, alphas[split_name(pair.name)[0]]) for pair in pairs]


def _with_alpha(pair: LoraPair, known: Counter[float]) -> LoraPair:
    alpha, _ = known.most_common(1)[0]
    share = pair.scale * pair.rank / alpha if alpha else 1.0
    if share == 1 or not alpha:
        return pair
    return replace(pair, up=pair.up * share, scale=alpha / pair.rank)


def shift_tensors(shifts: Sequence[Shift], stem: Callable[[str], str]) -> dict[str, Tensor]:
    """The shifts' tensors with LyCORIS's suffixes; tools read `b_norm` only beside a `w_norm`."""
    scaled = {shift.name for shift in shifts if shift.parameter == "weight"}
    return {
        stem(shift.name)
        + (f".{shift.parameter[0]}_norm" if shift.name in scaled else ".diff_b"): shift.values
        for shift in shifts
    }


def tensors_of(adapter: Adapter) -> dict[str, Tensor]:
    """The tensors of a file with the adapter's pairs and shifts."""
    if adapter.is_of_flow:
        return _flow_tensors(adapter)
    family = family_of(adapter) or "sd"
    tensors = {
        key: value
        for pair in of_one_alpha(adapter.pairs)
        for key, value in pair_tensors(stem_of(pair.name, family), pair)
    }
    for update in adapter.products:
        tensors |= lycoris.tensors_of(stem_of(update.name, family), update)
    return tensors | shift_tensors(adapter.shifts, partial(stem_of, family=family))


def _flow_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """The tensors of a flow transformer's file, by the names of its original code."""
    return {
        key: value
        for path, pair in by_native_name(adapter.pairs, known_family(adapter)).items()
        for key, value in pair_tensors(PREFIXES["unet"] + path.replace(".", "_"), pair)
    }


def header_of(adapter: Adapter) -> dict[str, str]:
    """Our metadata, other tools' entries, and those of kohya and ModelSpec that tools look up.

    Other tools' entries are kept, except those that describe the network (`ss_network_…`).
    """
    info = adapter.info
    alphas = {f"{pair.scale * pair.rank:g}" for pair in adapter.pairs}
    ranks = [str(rank) for rank in adapter.ranks()]
    widths = [
        p.down.shape[1] for p in adapter.pairs if p.name.endswith(("attn2_to_k", "attn2_to_v"))
    ]
    width = widths[0] if widths else 0
    known = {
        "ss_base_model_version": _VERSIONS.get(width, ""),
        "ss_v2": str(width == 1024) if width in _VERSIONS else "",
        "ss_output_name": info.trigger,
        "modelspec.architecture": _ARCHITECTURES.get(width, ""),
        "modelspec.title": info.trigger,
        "modelspec.trigger_phrase": info.trigger,
        "modelspec.license": info.licence,
    }
    stated = {key: value for key, value in known.items() if value} | adapter.foreign
    return (
        {"modelspec.sai_model_spec": "1.0.0"}
        | stated
        | metadata_of(adapter)
        | {
            "ss_network_module": "networks.lora",
            "ss_network_dim": ranks[0] if len(ranks) == 1 else "Dynamic",
            "ss_network_alpha": alphas.pop() if len(alphas) == 1 else "Dynamic",
            "ss_network_args": "{}",
        }
        | lycoris.header_of(adapter.products)
    )


def write(path: Path, adapter: Adapter) -> None:
    """Write pairs and shifts as one file."""
    write_tensors(path, tensors_of(adapter), header_of(adapter), adapter.dtype)
