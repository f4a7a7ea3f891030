"""ComfyUI's own names: the UNet under `diffusion_model.` with SGM's dotted path, kohya's suffixes.

ComfyUI reads alpha from `.alpha` tensors only, and text encoders by kohya's names or its own:
`text_encoders.clip_l.transformer.<path>`.
"""

import re
from functools import partial
from pathlib import Path

from torch import Tensor

from rite_diffusion.adapters.adapter import Adapter
from rite_diffusion.adapters.dialects import kohya, peft
from rite_diffusion.adapters.dialects.diffusers import at_scale_one
from rite_diffusion.adapters.families import family_of
from rite_diffusion.adapters.names import Family, dotted, from_sgm, module_name, split_name, to_sgm
from rite_diffusion.adapters.native import by_native_name, known_family
from rite_diffusion.adapters.storage import write_tensors

_SGM, _LYCORIS = "diffusion_model.", "lycoris_"
_ENCODERS = {  # ComfyUI's name or number of a CLIP model -> component
    "clip_l": "text_encoder",
    "clip_h": "text_encoder",
    "clip_g": "text_encoder_2",
    "0": "text_encoder",
    "1": "text_encoder_2",
}
_CLIP = re.compile(
    r"(?:text_encoders[._](?=[01][._])|(?:text_encoders[._])?(?=clip_))"
    r"(clip_[lhg]|[01])[._](?:transformer[._])?(.+)"
)


def module_of(stem: str) -> str | None:
    """The toolkit's name of a module; None where the stem is not ComfyUI's."""
    if stem.startswith(_SGM):
        return module_name("unet", from_sgm(stem.removeprefix(_SGM).replace(".", "_")))
    if stem.startswith(_LYCORIS):
        return module_name("unet", stem.removeprefix(_LYCORIS))
    if found := _CLIP.fullmatch(stem):
        return module_name(_ENCODERS[found[1]], found[2])
    return None


def stem_of(name: str, family: Family) -> str:
    """The stem that ComfyUI uses for a module."""
    component, flat = split_name(name)
    if component != "unet":
        return kohya.stem_of(name, family)
    return _SGM + dotted(to_sgm(flat, family))


def tensors_of(adapter: Adapter) -> dict[str, Tensor]:
    """The tensors of a file with the adapter's pairs and shifts.

    For a flow transformer with PEFT's suffixes and the scale in `lora_B`: with `.alpha` beside
    them diffusers 0.42 refuses FLUX.2's files.
    """
    if adapter.is_of_flow:
        native = by_native_name(adapter.pairs, known_family(adapter))
        return {
            key: value
            for path, pair in native.items()
            for key, value in peft.pair_tensors(_SGM + path, at_scale_one(pair)).items()
        }
    family = family_of(adapter) or "sd"
    tensors = {
        key: value
        for pair in adapter.pairs
        for key, value in kohya.pair_tensors(stem_of(pair.name, family), pair)
    }
    return tensors | kohya.shift_tensors(adapter.shifts, partial(stem_of, family=family))


def write(path: Path, adapter: Adapter) -> None:
    """Write pairs and shifts as one file."""
    write_tensors(path, tensors_of(adapter), kohya.header_of(adapter), adapter.dtype)
