"""Conversion of adapter files to the dialects of other tools, checked by loading them."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL.Image import Image

from rite_diffusion.adapters import Adapter, load_adapter
from rite_diffusion.adapters.attach import attach, base_layers, base_weights, detach
from rite_diffusion.adapters.dialects import DIALECTS, embeddings
from rite_diffusion.adapters.dialects.published import load_published
from rite_diffusion.adapters.families import family_of
from rite_diffusion.adapters.storage import DTYPES, dtype_name, write_tensors
from rite_diffusion.adapters.verify import (
    Verification,
    check_family,
    verify_by_map,
    verify_in_diffusers,
    verify_in_peft,
)
from rite_diffusion.backbones.protocols import Backbone
from rite_diffusion.backbones.source import load_backbone, open_pipeline
from rite_diffusion.errors import AdapterError
from rite_diffusion.files.writing import (
    check_outputs,
    file_output,
    folder_output,
    staging_folder,
    user_path,
)
from rite_diffusion.fusion.loss import ALLOWED, cut_adapter
from rite_diffusion.generation.denoise import sample

_READ_BY_DIFFUSERS = ("diffusers", "kohya")
STEPS = 4  # of the pictures that are compared


@dataclass(frozen=True)
class Export:
    """The files that a conversion wrote, and the results of its checks."""

    adapter: Adapter  # the original
    dtype: str  # in which it was written: fp32, fp16 or bf16
    path: Path  # the file, or PEFT's folder
    embeddings: list[Path]
    checks: list[Verification]
    lossy: dict[str, float]  # description of a loss -> its relative error
    pixels: int | None  # largest difference of two pictures, 0 to 255; None without a base


def convert(
    file: str | Path,
    to: str,
    out: str | Path | None = None,
    *,
    base: str | None = None,
    dtype: str | None = None,
    rank: int | None = None,
    published_pickle: bool = False,
    overwrite: bool = False,
    allow_loss: bool = False,
) -> Export:
    """Write an adapter of any dialect in the dialect `to`, and check the file by loading it.

    `out` defaults to a name beside the file; learned embeddings go into a folder of files beside
    it. Existing files under default names are replaced only with `overwrite`. With a base, the
    libraries of the dialect load the export, and two pictures are compared. `dtype` (fp32, fp16,
    bf16) defaults to the file's. Updates of a rank above `rank` are truncated to it; a relative
    error above 1 % (`lossy` of the result) is refused unless `allow_loss`. `published_pickle` reads
    a .pth of Mix-of-Show, Custom Diffusion or A1111 without running anything in it. Raises
    RiteError, and writes nothing, where the export would act differently.
    """
    if to not in DIALECTS:
        raise AdapterError(f"no dialect '{to}': choose one of {', '.join(DIALECTS)}")
    if dtype is not None and dtype not in DTYPES:
        raise AdapterError(f"no precision '{dtype}': choose one of {', '.join(DTYPES)}")
    source = user_path(file)
    backbone = load_backbone(base) if base else None
    if published_pickle:
        adapter = load_published(source, base_weights(backbone) if backbone else None)
    else:
        adapter = load_adapter(source)
    cut, lossy = _cut(adapter, rank)
    _check_losses(lossy, allow_loss)
    if adapter.tokens and not adapter.modules():
        return _embeddings_alone(adapter, source, out, overwrite)
    target = _target(source, to, out)
    words = target.with_name(f"{target.stem}-embeddings")
    files = [words / name for name in embeddings.embedding_files(adapter)]
    if not (to == "peft" and _is_empty_folder(target)):
        named, derived = ([target], files) if out else ([], [target, *files])
        check_outputs(named, derived, sources=[source], overwrite=overwrite)
    if base is None and adapter.info.base == "pocket":  # this base is always at hand
        base, backbone = "pocket", load_backbone("pocket")
    wanted = _as_wanted(cut, to, backbone, dtype)
    checks = _write_all(wanted, to, target, files, backbone, base)
    export = replace(load_adapter(target), tokens=embeddings.averaged(adapter))
    pixels = _pixel_difference(backbone, adapter, export) if backbone else None
    return Export(
        adapter,
        dtype_name(wanted.dtype),
        target,
        files,
        checks,
        lossy,
        pixels,
    )


def _write_all(
    adapter: Adapter,
    to: str,
    target: Path,
    files: list[Path],
    backbone: Backbone | None,
    base: str | None,
) -> list[Verification]:
    """Write an export and the `files` of its embeddings, all or none; returns its checks."""
    with staging_folder(target.parent) as folder:
        checks = _write(adapter, to, folder / target.name, backbone, base)
        made = embeddings.write(folder / "embeddings", adapter)
        (folder / target.name).replace(target)
        for path, place in zip(made, files, strict=True):
            place.parent.mkdir(exist_ok=True)
            path.replace(place)
    return checks


def _embeddings_alone(
    adapter: Adapter, source: Path, out: str | Path | None, overwrite: bool
) -> Export:
    """The export of an adapter that has learned embeddings only: files that every tool reads."""
    contents = embeddings.embedding_files(adapter)
    target = None if out is None else file_output(out, ".safetensors")
    if target is not None and len(contents) == 1:
        paths = [target]
        check_outputs(paths, sources=[source], overwrite=overwrite)
    else:
        paths = [(target or source).with_name(name) for name in contents]
        check_outputs(derived=paths, sources=[source], overwrite=overwrite)
    for path, tensors in zip(paths, contents.values(), strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, tensors, adapter.foreign, adapter.dtype)
    return Export(
        adapter, dtype_name(adapter.dtype), paths[0], paths, [], _averaging(adapter), None
    )


def _cut(adapter: Adapter, rank: int | None) -> tuple[Adapter, dict[str, float]]:
    """The adapter truncated to a rank, and what the export loses, with relative errors."""
    lossy = _averaging(adapter)
    if rank is None:
        return adapter, lossy
    cut, loss = cut_adapter(adapter, rank)
    larger = sum(pair.rank > rank for pair in adapter.pairs)
    return cut, lossy | ({f"{larger} modules are cut to rank {rank}": loss} if loss else {})


def _averaging(adapter: Adapter) -> dict[str, float]:
    return {
        f"the layers of {word} are averaged, as no other tool keeps them apart": (
            embeddings.averaging_error(adapter, word)
        )
        for word in embeddings.averaged_embeddings(adapter)
    }


def _check_losses(lossy: dict[str, float], allow_loss: bool) -> None:
    large = {what: loss for what, loss in lossy.items() if not loss <= ALLOWED}
    if large and not allow_loss:
        listed = "; ".join(f"{what}: relative error {loss:.2g}" for what, loss in large.items())
        raise AdapterError(
            f"the export would lose more than {ALLOWED:.0%}: {listed}. Accept it with --allow-loss"
            + (", or give a larger --rank." if any("cut" in what for what in large) else ".")
        )


def _target(source: Path, to: str, out: str | Path | None) -> Path:
    if out is not None:
        return folder_output(out) if to == "peft" else file_output(out, ".safetensors")
    return source.with_name(f"{source.stem}-{to}{'' if to == 'peft' else '.safetensors'}")


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _as_wanted(adapter: Adapter, to: str, backbone: Backbone | None, dtype: str | None) -> Adapter:
    """The adapter in the precision to write, with the family of its base where it is known."""
    precision = adapter.dtype if dtype is None else DTYPES[dtype]
    family = backbone.family if backbone else family_of(adapter) or ""
    wanted = replace(adapter, dtype=precision, info=replace(adapter.info, family=family))
    check_family(wanted, to)
    return wanted


def _write(
    adapter: Adapter, to: str, path: Path, backbone: Backbone | None, base: str | None
) -> list[Verification]:
    """Write the export and return the results of all checks that are possible."""
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
    """Whether diffusers would drop DoRA norms: its loaders do, of kohya's files."""
    return to == "kohya" and any(pair.magnitude is not None for pair in adapter.pairs)


def _pixel_difference(backbone: Backbone, original: Adapter, export: Adapter) -> int:
    """Largest difference, 0 to 255, between pictures drawn with each adapter."""
    prompt = f"a {original.info.trigger}".strip()
    one, other = (np.asarray(_picture(backbone, each, prompt), int) for each in (original, export))
    return int(np.abs(one - other).max())


def _picture(backbone: Backbone, adapter: Adapter, prompt: str) -> Image:
    attach(backbone, adapter, "exported")
    side = min(backbone.resolution, 256)
    [image] = sample(backbone, [prompt], [0], steps=STEPS, width=side, height=side)
    detach(backbone, "exported")
    return image
