"""An adapter file that a training starts from, `lora.init_from`."""

from pathlib import Path
from typing import Any

import torch

from rite_diffusion.adapters import Adapter, load_adapter
from rite_diffusion.adapters.attach import check_fit, is_other_base
from rite_diffusion.adapters.choice import Chosen
from rite_diffusion.adapters.names import module_name
from rite_diffusion.backbones.protocols import Backbone
from rite_diffusion.config import LoraSection
from rite_diffusion.errors import ConfigError
from rite_diffusion.files.writing import user_path
from rite_diffusion.methods.weights import adapted_paths
from rite_diffusion.types import LoraPair


def load_start(file: str) -> Adapter:
    """The adapter of a file to start from: LoRA pairs of one rank and one alpha, nothing else.

    Raises AdapterError where it cannot be read, and ConfigError naming what cannot be trained on.
    """
    adapter = load_adapter(user_path(file))
    dora = any(pair.magnitude is not None for pair in adapter.pairs)
    what = {
        "learned embeddings": adapter.tokens,
        "differences of biases or norms": adapter.shifts,
        "DoRA norms": dora,
    }
    for name, found in what.items():
        if found:
            raise ConfigError(f"lora.init_from: {file} has {name}, which pairs alone cannot go on.")
    if not adapter.pairs:
        raise ConfigError(f"lora.init_from: {file} has no LoRA pairs.")
    for name, value in (("rank", _rank), ("alpha", _alpha)):
        first = adapter.pairs[0]
        other = next((pair for pair in adapter.pairs if value(pair) != value(first)), None)
        if other is not None:
            raise ConfigError(
                f"lora.init_from: the pairs of {file} have different values of {name}, "
                f"{value(first):g} in {first.name} and {value(other):g} in {other.name}. "
                "Make them equal first: rite fuse FILE --method svd --rank 8."
            )
    if not _alpha(adapter.pairs[0]) > 0:
        raise ConfigError(f"lora.init_from: the alpha of {file} is {_alpha(adapter.pairs[0]):g}.")
    return adapter


def _rank(pair: LoraPair) -> int:
    return pair.rank


def _alpha(pair: LoraPair) -> float:
    return pair.scale * pair.rank


def with_rank_of_start(lora: LoraSection, given: dict[str, Any]) -> LoraSection:
    """The settings with rank and alpha of `init_from`, where that is set.

    ConfigError where `given`, what the user has set, states others.
    """
    if lora.init_from is None:
        return lora
    first = load_start(lora.init_from).pairs[0]
    found = {"rank": _rank(first), "alpha": _alpha(first)}
    for key, value in found.items():
        if given.get(key) not in (None, value):
            raise ConfigError(
                f"lora.{key} = {given[key]}, but {Path(lora.init_from).name} of lora.init_from has "
                f"{value:g}: leave lora.{key} out"
            )
    return lora.model_copy(update=found)


def check_start(backbone: Backbone, lora: LoraSection) -> None:
    """Raise RiteError where `init_from` does not fit the base or the layers that train."""
    if lora.init_from is None:
        return
    adapter = load_start(lora.init_from)
    info = adapter.info
    if is_other_base(info.base_fingerprint, backbone.fingerprint):
        raise ConfigError(
            f"lora.init_from was trained on '{info.base}' ({info.base_fingerprint}), this base is "
            f"'{backbone.name}' ({backbone.fingerprint}): pass the first as base."
        )
    check_fit(backbone, adapter)
    trained = {
        module_name(component, path)
        for component, paths in adapted_paths(backbone, lora.layers, lora.text_encoder).items()
        for path in paths
    }
    left = [name for name in adapter.names() if name not in trained]
    if left:
        raise ConfigError(
            f"{len(left)} of {len(adapter.pairs)} modules of lora.init_from (first: {left[0]}) do "
            f"not train with lora.layers = {lora.layers} and lora.text_encoder = "
            f"{str(lora.text_encoder).lower()}: set lora.layers = blocks or lora.text_encoder = "
            "true."
        )


def digest_of_start(lora: LoraSection) -> dict[str, str]:
    """The digest of `init_from`, which a resumed run compares; empty where that is not set."""
    if lora.init_from is None:
        return {}
    chosen = Chosen(user_path(lora.init_from), load_start(lora.init_from), 1.0)
    return {"lora.init_from": chosen.record().sha256}


@torch.no_grad()
def set_start(pairs: list[LoraPair], lora: LoraSection) -> None:
    """Copy the factors of `init_from`, where that is set, into the pairs that train.

    Pairs of layers that the file lacks stay as they are: their `up` is zero.
    """
    if lora.init_from is None:
        return
    own = {pair.name: pair for pair in pairs}
    for pair in load_start(lora.init_from).pairs:
        for ours, theirs in ((own[pair.name].down, pair.down), (own[pair.name].up, pair.up)):
            ours.copy_(theirs.reshape(ours.shape))
