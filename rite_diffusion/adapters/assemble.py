"""The tensors of an adapter file, by module and role, become checked LoRA pairs."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rite_diffusion.adapters.lycoris import (
    factor_rank,
    loha_delta,
    lokr_delta,
    lora_factors,
)
from rite_diffusion.types import AdapterError, LoraPair

LYCORIS = """hada_w1_a hada_w1_b hada_w2_a hada_w2_b hada_t1 hada_t2 lokr_w1 lokr_w1_a lokr_w1_b
lokr_w2 lokr_w2_a lokr_w2_b lokr_t1 lokr_t2 diff""".split()

# How tensor names end -> what the tensor is. Tools mix them within one file.
SUFFIXES = {
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_mid.weight": "mid",
    ".alpha": "alpha",
    ".dora_scale": "dora_scale",
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_magnitude_vector": "magnitude",
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora_magnitude_vector.default.weight": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
} | {f".{role}": role for role in LYCORIS}

Scale = Callable[[str, int], float | None]  # (module name, rank) -> its scale, where stated


@dataclass(frozen=True)
class Findings:
    """What had to be assumed or approximated."""

    without_alpha: int = 0
    errors: tuple[float, ...] = ()  # relative, of factorisations that became LoRA

    def notes(self) -> tuple[str, ...]:
        """The findings in words."""
        notes = []
        if self.without_alpha:
            notes.append(
                f"{self.without_alpha} modules state no alpha: taken as alpha = rank (scale 1)"
            )
        if self.errors:
            worst, mean = max(self.errors), sum(self.errors) / len(self.errors)
            notes.append(
                f"{len(self.errors)} modules are no LoRA and were turned into one by SVD: "
                f"relative error {mean:.2g} on average, {worst:.2g} at most"
            )
        return tuple(notes)


def split_key(key: str) -> tuple[str, str] | None:
    """Stem and role of a tensor's name; None where it ends like nothing known."""
    for suffix, role in SUFFIXES.items():
        if key.endswith(suffix):
            return key.removesuffix(suffix), role
    return None


def assemble(
    modules: Mapping[str, Mapping[str, Tensor]], stated: Scale
) -> tuple[list[LoraPair], Findings]:
    """Checked pairs of the modules' tensors by role, in the order of names."""
    pairs, findings = [], Findings()
    for name in sorted(modules):
        parts = modules[name]
        _check_numbers(name, parts)
        if parts.keys() & set(LYCORIS):
            pair, error = _other_factorisation(name, parts)
            findings = replace(findings, errors=(*findings.errors, error))
        else:
            pair, assumed = _plain(name, parts, stated)
            findings = replace(findings, without_alpha=findings.without_alpha + assumed)
        pairs.append(pair)
    inert = all(not pair.up.any() and pair.magnitude is None for pair in pairs)
    if pairs and inert:
        raise AdapterError(
            f"the `up` factors of all {len(pairs)} modules are zero: it changes nothing, so its "
            "training never began or was not saved"
        )
    return pairs, findings


def _check_numbers(name: str, parts: Mapping[str, Tensor]) -> None:
    for part in parts.values():
        if not part.is_floating_point():
            raise AdapterError(f"{name} holds {part.dtype}, not floating-point numbers")
        if not torch.isfinite(part.float()).all():
            raise AdapterError(f"{name} holds NaN or infinity: its training went wrong")


def _plain(name: str, parts: Mapping[str, Tensor], stated: Scale) -> tuple[LoraPair, bool]:
    """The pair of LoRA, LoCon or DoRA tensors, and whether its alpha had to be assumed."""
    if "down" not in parts or "up" not in parts:
        raise AdapterError(f"{name} has only one of its two factors. Get the file again")
    down, up = parts["down"].float(), parts["up"].float()
    if "mid" in parts:
        down = _with_core(name, down, parts["mid"].float())
    rank = down.shape[0] if down.ndim else 0
    fits = down.ndim == up.ndim and down.ndim in (2, 4) and rank > 0 and up.shape[1] == rank
    if not fits or (up.ndim == 4 and up.shape[2:] != (1, 1)) or not down.numel() * up.numel():
        shapes = f"{tuple(down.shape)}, {tuple(up.shape)}"
        raise AdapterError(f"the factors of {name} do not fit: {shapes}")
    alpha = _alpha(name, parts)
    scale = stated(name, rank) if alpha is None else alpha / rank
    pair = LoraPair(name, down, up, 1.0 if scale is None else scale, _magnitude(name, parts))
    return pair, scale is None


def _with_core(name: str, down: Tensor, core: Tensor) -> Tensor:
    """A convolution's down (p, in, k, k) of LoCon's core (p, q, k, k) and down (q, in, 1, 1)."""
    if core.ndim != 4 or down.ndim != 4 or core.shape[1] != down.shape[0]:
        shapes = f"{tuple(core.shape)}, {tuple(down.shape)}"
        raise AdapterError(f"the factors of {name} do not fit: {shapes}")
    return torch.einsum("pqkl,qi->pikl", core, down[:, :, 0, 0])


def _alpha(name: str, parts: Mapping[str, Tensor]) -> float | None:
    if "alpha" not in parts:
        return None
    if parts["alpha"].numel() != 1:
        raise AdapterError(f"the alpha of {name} has {parts['alpha'].numel()} values")
    value = float(parts["alpha"])
    if not math.isfinite(value):
        raise AdapterError(f"the alpha of {name} is {value}")
    return value


def _magnitude(name: str, parts: Mapping[str, Tensor]) -> Tensor | None:
    """DoRA's norms (out,); PEFT keeps them flat or (1, out, 1, 1), LyCORIS as (out, 1, …)."""
    outputs = parts["up"].shape[0]
    vector = parts.get("magnitude", parts.get("dora_scale"))
    if vector is None:
        return None
    by_output = "magnitude" in parts or vector.shape[0] == outputs
    if not by_output or vector.numel() != outputs:
        raise AdapterError(
            f"{name} is a DoRA whose {tuple(vector.shape)} norms are not one per output ({outputs})"
            ": this older form of LyCORIS is not supported"
        )
    return vector.float().flatten()


def _other_factorisation(name: str, parts: Mapping[str, Tensor]) -> tuple[LoraPair, float]:
    """A LoRA that stands for a LoHa, LoKr or full delta, and its relative error."""
    if "dora_scale" in parts:
        raise AdapterError(f"{name} is a LoHa or LoKr with DoRA norms, which is not supported")
    compute = loha_delta if "hada_w1_a" in parts else lokr_delta
    try:
        delta = parts["diff"].float() if "diff" in parts else compute(parts)
    except (KeyError, RuntimeError) as error:
        raise AdapterError(f"the factors of {name} are not whole or do not fit ({error})") from None
    if delta.ndim not in (2, 4):
        raise AdapterError(f"{name} changes a weight of shape {tuple(delta.shape)}")
    alpha, rank = _alpha(name, parts), factor_rank(parts)
    scale = 1.0 if alpha is None or rank is None else alpha / rank
    down, up, error = lora_factors(_unfolded(name, delta))
    return LoraPair(name, down, up, scale), error


def _unfolded(name: str, delta: Tensor) -> Tensor:
    """A delta (out, in * 9) of a 3x3 convolution as (out, in, 3, 3); others as they are."""
    threes = ("_conv1", "_conv2", "samplers_0_conv", "unet_conv_in", "unet_conv_out")
    if delta.ndim == 2 and name.endswith(threes) and delta.shape[1] % 9 == 0:
        return delta.reshape(delta.shape[0], -1, 3, 3)
    return delta
