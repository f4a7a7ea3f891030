"""The tensors of an adapter file, by module and role, become checked updates of the modules."""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from rite_diffusion.adapters import lycoris
from rite_diffusion.errors import AdapterError
from rite_diffusion.types import LoraPair, Shift

# What makes a module's update -> the roles of its tensors.
KINDS = {
    "LoRA": {"down", "up", "mid"},
    "LoHa": {f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    "LoKr": {f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    "whole difference": {"diff"},
}
VECTORS: dict[str, Literal["weight", "bias"]] = {
    "w_norm": "weight",
    "b_norm": "bias",
    "diff_b": "bias",
    "up_bias": "bias",
}

# How tensor names end -> what the tensor is. Tools mix them within one file.
SUFFIXES = {
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_mid.weight": "mid",
    ".alpha": "alpha",
    ".dora_scale": "dora_scale",
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_B.bias": "up_bias",
    ".lora_magnitude_vector": "magnitude",
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora_B.default.bias": "up_bias",
    ".lora_magnitude_vector.default.weight": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
} | {
    f".{role}": role
    for role in sorted(KINDS["LoHa"] | KINDS["LoKr"] | {"diff", "diff_b", "w_norm", "b_norm"})
}

# (module name, the factors' rank or None) -> its scale, where the file's configuration states it
Scale = Callable[[str, int | None], float | None]


@dataclass
class Findings:
    """What had to be assumed, and what is there beside LoRA."""

    without_alpha: int = 0
    stray_alphas: int = 0
    kinds: Counter[str] = field(default_factory=Counter)  # modules of kinds other than LoRA
    rank: int = 0  # the largest of theirs

    def notes(self) -> tuple[str, ...]:
        """The findings in words."""
        notes = []
        if self.without_alpha:
            notes.append(
                f"{self.without_alpha} modules state no alpha: taken as alpha = rank (scale 1)"
            )
        if self.stray_alphas:
            notes.append(f"{self.stray_alphas} alphas belong to no factors: left out")
        if self.kinds:
            listed = ", ".join(f"{count} of {kind}" for kind, count in self.kinds.items())
            notes.append(f"modules that are no LoRA: {listed}; exact as LoRA of rank {self.rank}")
        return tuple(notes)


def split_key(key: str) -> tuple[str, str] | None:
    """Stem and role of a tensor's name; None where it ends like nothing known."""
    for suffix, role in SUFFIXES.items():
        if key.endswith(suffix):
            return key.removesuffix(suffix), role
    return None


def assemble(
    modules: Mapping[str, Mapping[str, Tensor]], stated: Scale
) -> tuple[list[LoraPair], list[Shift], Findings]:
    """Checked updates of the modules' tensors by role, in the order of names."""
    pairs, shifts, findings = list[LoraPair](), list[Shift](), Findings()
    for name in sorted(modules):
        parts = modules[name]
        _check_numbers(name, parts)
        kind = _kind(name, parts)
        scale = _scale(name, kind, parts, stated)
        if kind:
            pairs.append(_pair(name, kind, parts, 1.0 if scale is None else scale))
            findings.without_alpha += scale is None
        if kind not in ("", "LoRA"):
            findings.kinds[kind] += 1
            findings.rank = max(findings.rank, pairs[-1].rank)
        here = _shifts(name, parts, scale)
        findings.stray_alphas += not kind and not here
        shifts += here
    _refuse_inert(pairs, shifts)
    return pairs, shifts, findings


def _refuse_inert(pairs: list[LoraPair], shifts: list[Shift]) -> None:
    inert = all(not (p.up.any() and p.down.any()) and p.magnitude is None for p in pairs)
    if pairs and inert and not any(shift.values.any() for shift in shifts):
        raise AdapterError(
            f"the `up` factors of all {len(pairs)} modules are zero: it changes nothing, so its "
            "training never began or was not saved"
        )


def _check_numbers(name: str, parts: Mapping[str, Tensor]) -> None:
    for role, part in parts.items():
        if not part.is_floating_point() and (role != "alpha" or part.is_complex()):
            raise AdapterError(f"{name} holds {part.dtype}, not floating-point numbers")
        if not part.numel():
            raise AdapterError(f"the {role} of {name} is empty. Get the file again")
        if not torch.isfinite(part.float()).all():
            raise AdapterError(
                f"the {role} of {name} holds NaN or infinity: its training went wrong"
            )


def _kind(name: str, parts: Mapping[str, Tensor]) -> str:
    """What makes the module's update; empty where nothing but vectors or an alpha is there."""
    if "diff" in parts and parts["diff"].ndim == 1:
        parts = {role: part for role, part in parts.items() if role != "diff"}
    kinds = [kind for kind, roles in KINDS.items() if parts.keys() & roles]
    if len(kinds) > 1:
        raise AdapterError(f"{name} is {' and '.join(kinds)} at once, which no tool reads")
    if not kinds and parts.keys() & {"dora_scale", "magnitude"}:
        raise AdapterError(f"{name} has DoRA norms and no factors. Get the file again")
    return kinds[0] if kinds else ""


def _scale(name: str, kind: str, parts: Mapping[str, Tensor], stated: Scale) -> float | None:
    """What the factors' product is multiplied by; None where it has to be assumed."""
    alpha = _alpha(name, parts)
    if kind in ("", "whole difference"):
        return 1.0
    rank = parts["down"].shape[0] if parts.get("down", torch.ones(())).ndim else None
    if "mid" in parts and parts["mid"].ndim:
        rank = parts["mid"].shape[0]
    if kind != "LoRA":
        rank = lycoris.factor_rank(parts)
    if alpha is None:
        found = stated(name, rank)
        return 1.0 if found is None and rank is None else found
    return 1.0 if rank is None else alpha / rank


def _alpha(name: str, parts: Mapping[str, Tensor]) -> float | None:
    """A scalar of any shape and numeric type."""
    if "alpha" not in parts:
        return None
    if parts["alpha"].numel() != 1:
        raise AdapterError(f"the alpha of {name} has {parts['alpha'].numel()} values")
    value = float(parts["alpha"])
    if not math.isfinite(value):
        raise AdapterError(f"the alpha of {name} is {value}")
    return value


def _pair(name: str, kind: str, parts: Mapping[str, Tensor], scale: float) -> LoraPair:
    """The module's update as LoRA factors, exact for every kind."""
    if kind == "LoRA":
        down, up = _factors(name, parts)
    else:
        down, up = _other_factors(name, kind, parts)
    for factor in (down, up):
        if not torch.isfinite(factor).all():
            raise AdapterError(f"the factors of {name} are too large for fp32")
    return LoraPair(name, down, up, scale, _magnitude(name, parts, len(up)))


def _factors(name: str, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Down and up of LoRA, LoCon or DoRA tensors."""
    if "down" not in parts or "up" not in parts:
        raise AdapterError(f"{name} has only one of its two factors. Get the file again")
    down, up = parts["down"].float(), parts["up"].float()
    if "mid" in parts:
        down = _with_core(name, down, parts["mid"].float())
    if {down.ndim, up.ndim} == {2, 4}:  # a 1x1 convolution's, one of them as a matrix
        down, up = (part.reshape(*part.shape, *[1] * (4 - part.ndim)) for part in (down, up))
    fits = down.ndim == up.ndim and down.ndim in (2, 4) and up.shape[1] == down.shape[0]
    if not fits or (up.ndim == 4 and up.shape[2:] != (1, 1)):
        shapes = f"{tuple(parts['down'].shape)}, {tuple(parts['up'].shape)}"
        raise AdapterError(f"the factors of {name} do not fit: {shapes}")
    return down, up


def _with_core(name: str, down: Tensor, core: Tensor) -> Tensor:
    """A convolution's down (p, in, k, k) of LoCon's core (p, q, k, k) and down (q, in, 1, 1)."""
    fits = core.ndim == 4 and down.ndim in (2, 4) and down.shape[2:] in ((), (1, 1))
    if not fits or core.shape[1] != down.shape[0]:
        shapes = f"{tuple(core.shape)}, {tuple(down.shape)}"
        raise AdapterError(f"the factors of {name} do not fit: {shapes}")
    return torch.einsum("pqkl,qi->pikl", core, down.flatten(1))


def _other_factors(name: str, kind: str, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Down and up of a LoHa, LoKr or whole difference."""
    try:
        if kind == "whole difference":
            product = _whole(parts["diff"])
        else:
            product = {"LoHa": lycoris.loha, "LoKr": lycoris.lokr}[kind](parts)
    except KeyError as error:
        raise AdapterError(f"{name} is a {kind} without its {error}. Get the file again") from None
    except (ValueError, RuntimeError) as error:
        raise AdapterError(f"the factors of {name}, a {kind}, do not fit ({error})") from None
    if not product.kernel and _is_three_by_three(name) and product.right.shape[1] % 9 == 0:
        product = lycoris.Product(product.left, product.right, (3, 3))
    return product.down().contiguous(), product.up().contiguous()


def _whole(difference: Tensor) -> lycoris.Product:
    if difference.ndim not in (2, 4):
        raise ValueError(f"it changes a weight of shape {tuple(difference.shape)}")
    return lycoris.whole(difference)


def _is_three_by_three(name: str) -> bool:
    """Whether the module is a convolution whose kernel (in * 9) factors may hold flat."""
    return name.endswith(("_conv1", "_conv2", "samplers_0_conv", "unet_conv_in", "unet_conv_out"))


def _magnitude(name: str, parts: Mapping[str, Tensor], outputs: int) -> Tensor | None:
    """DoRA's norms (out,); PEFT keeps them flat or (1, out, 1, 1), LyCORIS as (out, 1, …)."""
    vector = parts.get("magnitude", parts.get("dora_scale"))
    if vector is None:
        return None
    by_output = "magnitude" in parts or (vector.ndim and vector.shape[0] == outputs)
    if not by_output or vector.numel() != outputs or {"magnitude", "dora_scale"} <= parts.keys():
        raise AdapterError(
            f"{name} is a DoRA whose {tuple(vector.shape)} norms are not one per output ({outputs})"
            ": this older form of LyCORIS is not supported"
        )
    return vector.float().flatten()


def _shifts(name: str, parts: Mapping[str, Tensor], scale: float | None) -> list[Shift]:
    """What is added to the module's bias or, of a norm, to its weight."""
    vectors = {role: parts[role].float() for role in VECTORS if role in parts}
    if "diff" in parts and parts["diff"].ndim == 1:
        vectors["diff"] = parts["diff"].float()
    if "up_bias" in vectors:  # behind `up`, so the scale counts
        vectors["up_bias"] = vectors["up_bias"] * (1.0 if scale is None else scale)
    shifts = {}
    for role, values in vectors.items():
        place = VECTORS.get(role, "weight")
        if place in shifts:
            raise AdapterError(f"the difference of {name}'s {place} is there twice")
        if values.ndim != 1:
            raise AdapterError(f"the {role} of {name} is {tuple(values.shape)}, no vector")
        shifts[place] = Shift(name, place, values)
    return list(shifts.values())
