"""LoRA pairs and shifts from the tensors of an adapter file, checked module by module."""

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

# Kind of update -> the roles of its tensors.
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

# Ending of a tensor's name -> its role. Tools mix these within one file.
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

# (module name, rank of the factors or None) -> scale; None where no configuration states it
Scale = Callable[[str, int | None], float | None]


@dataclass
class Findings:
    """Counts of what a user should know about a file: missing alphas and updates beside LoRA."""

    without_alpha: int = 0
    stray_alphas: int = 0
    kinds: Counter[str] = field(default_factory=Counter)  # modules by kind, LoRA left out
    rank: int = 0  # the largest that such a module needs as a LoRA

    def notes(self) -> tuple[str, ...]:
        """One line for each finding."""
        notes = []
        if self.without_alpha:
            notes.append(
                f"{self.without_alpha} modules state no alpha: taken as alpha = rank (scale 1)"
            )
        if self.stray_alphas:
            notes.append(f"{self.stray_alphas} alphas have no factors: left out")
        if self.kinds:
            listed = ", ".join(f"{count} of {kind}" for kind, count in self.kinds.items())
            notes.append(f"modules that are not LoRA: {listed}; exact as LoRA of rank {self.rank}")
        return tuple(notes)


def split_key(key: str) -> tuple[str, str] | None:
    """Stem and role of a tensor's name; None where its ending is unknown."""
    for suffix, role in SUFFIXES.items():
        if key.endswith(suffix):
            return key.removesuffix(suffix), role
    return None


def assemble(
    modules: Mapping[str, Mapping[str, Tensor]], stated: Scale
) -> tuple[list[LoraPair], list[Shift], Findings]:
    """LoRA pairs and shifts, sorted by module name, from each module's tensors by role.

    `stated` returns a scale that the file's configuration states. AdapterError names the module
    whose tensors are incomplete, do not fit, or are not finite.
    """
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
            f"the `up` factors of all {len(pairs)} modules are zero, so it changes nothing: its "
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
    """The kind of the module's update; empty where it has only vectors or an alpha."""
    if "diff" in parts and parts["diff"].ndim == 1:
        parts = {role: part for role, part in parts.items() if role != "diff"}
    kinds = [kind for kind, roles in KINDS.items() if parts.keys() & roles]
    if len(kinds) > 1:
        raise AdapterError(f"{name} has tensors of {' and '.join(kinds)}, which no tool reads")
    if not kinds and parts.keys() & {"dora_scale", "magnitude"}:
        raise AdapterError(f"{name} has DoRA norms but no factors. Get the file again")
    return kinds[0] if kinds else ""


def _scale(name: str, kind: str, parts: Mapping[str, Tensor], stated: Scale) -> float | None:
    """The factor on the product of the factors; None where it has to be assumed."""
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
    """The module's alpha, a scalar of any shape and numeric type; None where it has none."""
    if "alpha" not in parts:
        return None
    if parts["alpha"].numel() != 1:
        raise AdapterError(f"the alpha of {name} has {parts['alpha'].numel()} values")
    value = float(parts["alpha"])
    if not math.isfinite(value):
        raise AdapterError(f"the alpha of {name} is {value}")
    return value


def _pair(name: str, kind: str, parts: Mapping[str, Tensor], scale: float) -> LoraPair:
    """The module's update as a LoRA pair, exact for every kind."""
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
    if {down.ndim, up.ndim} == {2, 4}:  # of a 1x1 convolution, with one factor as a matrix
        down, up = (part.reshape(*part.shape, *[1] * (4 - part.ndim)) for part in (down, up))
    fits = down.ndim == up.ndim and down.ndim in (2, 4) and up.shape[1] == down.shape[0]
    if not fits or (up.ndim == 4 and up.shape[2:] != (1, 1)):
        shapes = f"{tuple(parts['down'].shape)}, {tuple(parts['up'].shape)}"
        raise AdapterError(f"the factors of {name} do not fit: {shapes}")
    return down, up


def _with_core(name: str, down: Tensor, core: Tensor) -> Tensor:
    """LoCon's core (p, q, k, k) times its down (q, in, 1, 1): a down (p, in, k, k)."""
    fits = core.ndim == 4 and down.ndim in (2, 4) and down.shape[2:] in ((), (1, 1))
    if not fits or core.shape[1] != down.shape[0]:
        shapes = f"{tuple(core.shape)}, {tuple(down.shape)}"
        raise AdapterError(f"the factors of {name} do not fit: {shapes}")
    return torch.einsum("pqkl,qi->pikl", core, down.flatten(1))


def _other_factors(name: str, kind: str, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Down and up of a LoHa, a LoKr or a whole difference."""
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
        raise ValueError(f"its shape is {tuple(difference.shape)}")
    return lycoris.whole(difference)


def _is_three_by_three(name: str) -> bool:
    """Whether the module is a 3x3 convolution; its factors may be stored flat, (r, in * 9)."""
    return name.endswith(("_conv1", "_conv2", "samplers_0_conv", "unet_conv_in", "unet_conv_out"))


def _magnitude(name: str, parts: Mapping[str, Tensor], outputs: int) -> Tensor | None:
    """DoRA's norms (out,); files have them as (out,), (1, out, 1, 1) or (out, 1, …)."""
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
    """Differences of the module's bias and, where it is a norm, of its weight."""
    vectors = {role: parts[role].float() for role in VECTORS if role in parts}
    if "diff" in parts and parts["diff"].ndim == 1:
        vectors["diff"] = parts["diff"].float()
    if "up_bias" in vectors:  # part of `up`, so the scale multiplies it
        vectors["up_bias"] = vectors["up_bias"] * (1.0 if scale is None else scale)
    shifts = {}
    for role, values in vectors.items():
        place = VECTORS.get(role, "weight")
        if place in shifts:
            raise AdapterError(f"the file holds two differences of {name}'s {place}")
        if values.ndim != 1:
            raise AdapterError(f"the {role} of {name} is {tuple(values.shape)}, not a vector")
        shifts[place] = Shift(name, place, values)
    return list(shifts.values())
