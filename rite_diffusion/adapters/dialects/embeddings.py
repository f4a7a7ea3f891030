"""Learned embeddings in files: our `tokens.<word>`, A1111's, diffusers', and bundles.

    tokens.<word>                        (layers, vectors, width), our own, all layers kept
    emb_params                           (vectors, width), A1111's file for SD1 and SD2
    clip_l, clip_g                       (vectors, width), A1111's and diffusers' for SDXL
    bundle_emb.<word>.string_to_param.*  (vectors, width), embeddings within a LoRA file (A1111)
    bundle_emb.<word>.clip_l, .clip_g    the same for SDXL (OneTrainer)
    <word>                               (width,) or (vectors, width), diffusers' textual inversion;
                                         any word where it is the file's only tensor

A file of one unnamed embedding has its word as the file's name. No other tool reads vectors that
differ between layers: the layers are averaged for them, which is lossy.
"""

import re
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor

from rite_diffusion.adapters.adapter import Adapter
from rite_diffusion.adapters.delta import relative_difference
from rite_diffusion.adapters.storage import write_tensors
from rite_diffusion.errors import AdapterError

OWN, BUNDLE, SECOND = "tokens.", "bundle_emb.", "@2"
_LONGEST = 200  # bytes of a file's name
_SINGLE = {"emb_params": "", "clip_l": "", "clip_g": SECOND}
_BUNDLED = {".string_to_param.*": "", ".clip_l": "", ".clip_g": SECOND}


def split_tokens(
    tensors: Mapping[str, Tensor], word: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The learned embeddings of a file by word, and the file's other tensors.

    `word` is the file's name, the word of an embedding that the file does not name.
    """
    tokens: dict[str, Tensor] = {}
    others: dict[str, Tensor] = {}
    alone = len(tensors) == 1
    for key, value in tensors.items():
        name = _word(key, word) or (key if alone and _is_inversion(key, value) else None)
        if name is None:
            others[key] = value
        elif name in tokens:
            raise AdapterError(f"the word '{name}' has two embeddings")
        else:
            tokens[name] = checked_token(name, value)
    return tokens, others


def _word(key: str, word: str) -> str | None:
    """The word whose embedding a tensor is; None where it is not an embedding."""
    if key.startswith(OWN):
        return key.removeprefix(OWN)
    if key in _SINGLE:
        return word + _SINGLE[key]
    if key.startswith(BUNDLE):
        for suffix, encoder in _BUNDLED.items():
            if key.endswith(suffix):
                return key.removeprefix(BUNDLE).removesuffix(suffix) + encoder
    return key if re.fullmatch(r"<[^<>]+>", key) else None


def _is_inversion(key: str, value: Tensor) -> bool:
    """Whether diffusers reads a file's only tensor as a textual inversion."""
    return value.ndim in (1, 2) and "." not in key and not key.startswith("lora_")


def checked_token(word: str, rows: Tensor) -> Tensor:
    """An embedding as fp32 (layers, vectors, width); AdapterError where it is not valid."""
    plain = word.isprintable() and word.strip() == word and 0 < len(word) <= 80
    if not plain or word.startswith(".") or re.search(r"[/\\:]|\.\.", word):
        raise AdapterError(f"{word!r} cannot be the word of an embedding")
    if rows.ndim not in (1, 2, 3) or not rows.numel() or not rows.is_floating_point():
        raise AdapterError(f"the embedding of '{word}' is a {rows.dtype} of {tuple(rows.shape)}")
    rows = rows.float()
    if not torch.isfinite(rows).all():
        raise AdapterError(f"the embedding of '{word}' holds NaN or infinity")
    return rows.reshape(*[1] * (3 - rows.ndim), *rows.shape)


def own_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """The learned embeddings as tensors of our own file."""
    return {OWN + word: checked_token(word, rows.detach()) for word, rows in adapter.tokens.items()}


def averaged(adapter: Adapter) -> dict[str, Tensor]:
    """The learned embeddings (1, vectors, width), averaged over layers, for other tools."""
    return {word: rows.mean(0, keepdim=True) for word, rows in adapter.tokens.items()}


def embedding_files(adapter: Adapter) -> dict[str, dict[str, Tensor]]:
    """File name -> tensors of an embedding file in A1111's form; layers are averaged."""
    files, tokens = {}, averaged(adapter)
    for word, rows in tokens.items():
        if word.endswith(SECOND):
            continue
        second = tokens.get(word + SECOND)
        name = f"{_free_name(word, {each.casefold() for each in files})}.safetensors"
        if second is None:
            files[name] = {"emb_params": rows[0]}
        else:
            files[name] = {"clip_l": rows[0], "clip_g": second[0]}
    return files


def _free_name(word: str, taken: Collection[str]) -> str:
    """A file name for a word, with a number where the name is taken."""
    plain = re.sub(r"[^\w\-]", "", word).encode()[:_LONGEST].decode(errors="ignore") or "token"
    names = (plain, *(f"{plain}-{number}" for number in range(2, len(taken) + 3)))
    return next(name for name in names if f"{name}.safetensors".casefold() not in taken)


def write(folder: Path, adapter: Adapter) -> list[Path]:
    """Write one embedding file per word into a folder; returns their paths."""
    paths = []
    for name, tensors in embedding_files(adapter).items():
        write_tensors(folder / name, tensors, {}, adapter.dtype)
        paths.append(folder / name)
    return paths


def averaged_embeddings(adapter: Adapter) -> list[str]:
    """Words of layer-wise embeddings, which an embedding file holds averaged."""
    return [word for word, rows in adapter.tokens.items() if len(rows) > 1]


def averaging_error(adapter: Adapter, word: str) -> float:
    """The relative error of averaging a word's layers: |mean - layers| / |layers|."""
    rows = adapter.tokens[word]
    return relative_difference(rows.mean(0, keepdim=True).expand_as(rows), rows)
