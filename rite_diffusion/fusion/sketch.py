"""The sketch file: second moments of each layer's inputs while an adapter draws its concept.

With `dog.sketch.safetensors` beside `dog.safetensors` the adapter is fused without sampling.

    <concept|base>.<layer>.basis    (k, inputs) half precision, orthonormal rows
    <concept|base>.<layer>.values   (k,) eigenvalues minus the tail
    <concept|base>.<layer>.tail     scalar

`base` holds the same for ordinary prompts without the adapter. Layers that share their inputs are
stored once; the header's `layers` names each layer's tensors.
"""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from rite_diffusion.errors import FusionError
from rite_diffusion.files.writing import write_output
from rite_diffusion.fusion.second_moments import SecondMoment, truncated
from rite_diffusion.fusion.statistics import SecondMoments

SUFFIX = ".sketch.safetensors"
KIND = "rite_sketch"


@dataclass(frozen=True)
class SketchMetadata:
    """The metadata of a sketch."""

    adapter: str  # digest of the adapter's tensors
    base_fingerprint: str
    prompts: str
    version: str


@dataclass(frozen=True)
class Sketch:
    """Second moments by layer: `concept` with an adapter and its prompts, `base` without."""

    concept: SecondMoments
    base: SecondMoments
    metadata: SketchMetadata


def sketch_path(adapter: Path) -> Path:
    """The path of an adapter's sketch: `dog.safetensors` -> `dog.sketch.safetensors`."""
    return adapter.with_name(adapter.name.removesuffix(".safetensors") + SUFFIX)


def save_sketch(path: Path, sketch: Sketch, keep: int) -> None:
    """Write a sketch atomically, with at most `keep` directions per layer."""
    tensors: dict[str, Tensor] = {}
    layers: dict[str, dict[str, list]] = {}
    for side, moments in (("concept", sketch.concept), ("base", sketch.base)):
        homes: dict[int, str] = {}
        layers[side] = {}
        for name, moment in moments.items():
            home = homes.setdefault(id(moment), f"{side}.{name}")
            layers[side][name] = [home, moment.rows]
            if home == f"{side}.{name}":
                tensors |= _tensors(home, truncated(moment, keep))
    header = {KIND: "1", "layers": json.dumps(layers)} | asdict(sketch.metadata)
    write_output(path, save(tensors, header))


def _tensors(home: str, moment: SecondMoment) -> dict[str, Tensor]:
    return {
        f"{home}.basis": moment.basis.half().contiguous(),
        f"{home}.values": moment.values.float().contiguous(),
        f"{home}.tail": torch.tensor(moment.tail),
    }


def load_sketch(path: Path) -> Sketch:
    """The sketch in a file; FusionError where the file is damaged or not a sketch."""
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, OSError) as error:
        raise FusionError(
            f"{path} is damaged: {error}. Make it again with `rite sketch`."
        ) from None
    if KIND not in header:
        raise FusionError(f"{path} is not a sketch. Make one with `rite sketch`.")
    try:
        layers = json.loads(header["layers"])
        homes = {home: rows for side in layers.values() for home, rows in side.values()}
        moments: SecondMoments = {
            home: _second_moment(tensors, home, rows) for home, rows in homes.items()
        }
        sides: dict[str, SecondMoments] = {
            side: {name: moments[home] for name, (home, _) in layers[side].items()}
            for side in ("concept", "base")
        }
        metadata = SketchMetadata(
            **{field.name: header[field.name] for field in fields(SketchMetadata)}
        )
    except (KeyError, ValueError, TypeError) as error:
        raise FusionError(
            f"{path} is incomplete ({error}). Make it again with `rite sketch`."
        ) from None
    return Sketch(sides["concept"], sides["base"], metadata)


def _second_moment(tensors: dict[str, Tensor], home: str, rows: int) -> SecondMoment:
    """A stored second moment; QR makes the basis orthonormal again after rounding to half."""
    basis, values = tensors[f"{home}.basis"].double(), tensors[f"{home}.values"].double()
    tail = float(tensors[f"{home}.tail"])
    fits = basis.ndim == 2 and values.shape == basis.shape[:1] and len(basis) <= basis.shape[1]
    if not (fits and bool(basis.isfinite().all()) and bool((values >= 0).all()) and tail >= 0):
        raise ValueError(f"{home} is out of shape or range")
    return SecondMoment(torch.linalg.qr(basis.mT).Q.mT, values, tail, rows)
