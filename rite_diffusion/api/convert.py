"""An adapter file in another tool's dialect, proven by loading it back."""

import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL.Image import Image

from rite_diffusion.adapters import Adapter, attach, detach, load_adapter
from rite_diffusion.adapters.attach import base_layers, base_weights
from rite_diffusion.adapters.dialects import DIALECTS, embeddings
from rite_diffusion.adapters.dialects.published import load_published
from rite_diffusion.adapters.storage import write_tensors
from rite_diffusion.adapters.verify import (
    Verification,
    verify_by_map,
    verify_in_diffusers,
    verify_in_peft,
)
from rite_diffusion.backbones import load_backbone
from rite_diffusion.backbones.protocols import Backbone
from rite_diffusion.backbones.source import open_pipeline
from rite_diffusion.errors import AdapterError
from rite_diffusion.generation.denoise import sample

_READ_BY_DIFFUSERS = ("diffusers", "kohya")
STEPS = 4  # of the pictures that are compared


@dataclass(frozen=True)
class Export:
    """What a conversion wrote and what proves it."""

    adapter: Adapter  # the original
    path: Path  # the file, or PEFT's folder
    embeddings: list[Path]
    checks: list[Verification]
    lossy: list[str]  # words whose layers the embedding files average
    pixels: int | None  # largest difference of two pictures, 0 to 255; None without a base


def convert(
    file: str | Path,
    to: str,
    out: str | Path | None = None,
    *,
    base: str | None = None,
    published_pickle: bool = False,
) -> Export:
    """Write an adapter of any dialect in the dialect `to`, and load it back by its rules.

    `out` defaults to a name beside the file. With a base, real libraries load the export and two
    pictures are compared. `published_pickle` reads a .pth of Mix-of-Show, Custom Diffusion or A1111
    without running anything in it. Raises AdapterError, and writes nothing, where the export would
    not act as the original.
    """
    if to not in DIALECTS:
        raise AdapterError(f"no dialect '{to}': choose one of {', '.join(DIALECTS)}")
    source = Path(file).expanduser()
    backbone = load_backbone(base) if base else None
    if published_pickle:
        adapter = load_published(source, base_weights(backbone) if backbone else None)
    else:
        adapter = load_adapter(source)
    if base is None and adapter.info.base == "pocket":  # this base is always at hand
        base, backbone = "pocket", load_backbone("pocket")
    if adapter.tokens and not adapter.modules():
        return _embeddings_alone(adapter, source, Path(out).expanduser() if out else None)
    target = Path(out).expanduser() if out else _default_target(source, to)
    if target.exists():
        raise AdapterError(f"{target} exists already: choose another --out, or delete it")
    partial = target.with_name(f".{target.stem}.{os.getpid()}.partial{target.suffix}")
    try:
        checks = _write(adapter, to, partial, backbone, base)
        partial.rename(target)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial)
        partial.unlink(missing_ok=True)
    files = embeddings.write(target.parent, adapter)
    export = replace(load_adapter(target), tokens=embeddings.averaged(adapter))
    pixels = _pixel_difference(backbone, adapter, export) if backbone else None
    return Export(adapter, target, files, checks, embeddings.lossy_words(adapter), pixels)


def _embeddings_alone(adapter: Adapter, source: Path, out: Path | None) -> Export:
    """Embedding files of an adapter of words alone: the same for every tool."""
    contents = embeddings.embedding_files(adapter)
    folder = (out or source).parent
    paths = [out] if out and len(contents) == 1 else [folder / name for name in contents]
    for path in paths:
        if path.exists():
            raise AdapterError(f"{path} exists already: choose another --out, or delete it")
    for path, tensors in zip(paths, contents.values(), strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, tensors, {})
    return Export(adapter, paths[0], paths, [], embeddings.lossy_words(adapter), None)


def _default_target(source: Path, to: str) -> Path:
    return source.with_name(f"{source.stem}-{to}{'' if to == 'peft' else '.safetensors'}")


def _write(
    adapter: Adapter, to: str, path: Path, backbone: Backbone | None, base: str | None
) -> list[Verification]:
    """Write the export and check it in every way that is at hand."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not adapter.modules():
        raise AdapterError("the adapter holds no layers to convert")
    norms = [pair.name for pair in adapter.pairs if pair.magnitude is not None]
    if to == "diffusers" and any(name.startswith("lora_te") for name in norms):
        raise AdapterError(
            "diffusers drops the DoRA norms of text encoders when it loads a file: convert to "
            "peft or kohya"
        )
    DIALECTS[to].write(path, adapter)
    if to == "peft":
        return [verify_in_peft(adapter, path)]
    layers = base_layers(backbone) if backbone else None
    checks = [verify_by_map(adapter, path, to, layers)]
    if backbone and base and to in _READ_BY_DIFFUSERS and not _loses_dora(adapter, to):
        checks.append(verify_in_diffusers(adapter, path, open_pipeline(base, backbone.dtype)))
    return checks


def _loses_dora(adapter: Adapter, to: str) -> bool:
    """Diffusers' loaders for Stable Diffusion drop the DoRA norms of kohya's files."""
    return to == "kohya" and any(pair.magnitude is not None for pair in adapter.pairs)


def _pixel_difference(backbone: Backbone, original: Adapter, export: Adapter) -> int:
    """Largest difference, 0 to 255, between pictures with the one and with the other."""
    prompt = f"a {original.info.trigger}".strip()
    one, other = (np.asarray(_picture(backbone, each, prompt), int) for each in (original, export))
    return int(np.abs(one - other).max())


def _picture(backbone: Backbone, adapter: Adapter, prompt: str) -> Image:
    attach(backbone, adapter, "exported")
    side = min(backbone.resolution, 256)
    [image] = sample(backbone, [prompt], [0], steps=STEPS, width=side, height=side)
    detach(backbone, "exported")
    return image
