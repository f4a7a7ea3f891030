"""Fusion of adapters into one, layer by layer."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import tomlkit

from rite_diffusion._version import __version__
from rite_diffusion.adapters import Adapter, AdapterInfo
from rite_diffusion.adapters.families import family_of
from rite_diffusion.errors import FusionError
from rite_diffusion.fusion import FUSIONS, Fusion
from rite_diffusion.fusion.embeddings import merge_tokens
from rite_diffusion.fusion.layer import as_pair
from rite_diffusion.fusion.loss import Loss
from rite_diffusion.fusion.members import Member, check_and_sort, layers
from rite_diffusion.fusion.settings import FusionSettings
from rite_diffusion.fusion.shifts import merge_shifts
from rite_diffusion.types import LoraPair


def method_named(name: str) -> Fusion:
    """The fusion method of that name; FusionError lists the known ones."""
    if name not in FUSIONS:
        raise FusionError(f"no method '{name}': choose one of {', '.join(sorted(FUSIONS))}.")
    return FUSIONS[name]


@dataclass(frozen=True)
class Merged:
    """A fused adapter, and the loss from the limit on its rank."""

    adapter: Adapter
    loss: float  # relative Frobenius error of all layers' updates


# A single adapter is returned at its weight, whatever the method.
_ALONE = Fusion(lambda layer, settings: layer.parts[0].factors, statistics=False)


def merge(members: Sequence[Member], name: str, settings: FusionSettings) -> Adapter:
    """One adapter with all members' concepts, by the method `name`; their order does not matter.

    A single member is returned at its weight. Raises FusionError for members that cannot be fused.
    """
    return merge_with_loss(members, name, settings).adapter


def merge_with_loss(members: Sequence[Member], name: str, settings: FusionSettings) -> Merged:
    """The adapter that `merge` returns, and the loss from the limit on its rank."""
    members = check_and_sort(members)
    method = method_named(name) if len(members) > 1 else _ALONE
    pairs, loss = list[LoraPair](), Loss()
    for layer, kernel in layers(members):
        whole = method.fuse_layer(layer, settings)
        cut = method.cut(layer, whole, settings)
        loss.add(whole, cut)
        pairs.append(as_pair(layer.name, cut, kernel))
    tokens = merge_tokens([member.adapter.tokens for member in members])
    shifts = merge_shifts(members, name)
    info = fused_info(members, name, settings)
    return Merged(Adapter(pairs, info, tokens, shifts=shifts), loss.relative())


def fused_info(members: Sequence[Member], name: str, settings: FusionSettings) -> AdapterInfo:
    """The metadata of a fused adapter: all triggers, the source of each, and the settings."""
    infos = [member.adapter.info for member in members]
    table = {"method": name} | settings.model_dump(exclude_none=True)
    return AdapterInfo(
        trigger=_joined(info.trigger for info in infos),
        class_noun=_joined(info.class_noun for info in infos),
        base=next((info.base for info in infos if info.base), ""),
        base_fingerprint=next((i.base_fingerprint for i in infos if i.base_fingerprint), ""),
        family=next(filter(None, (family_of(member.adapter) for member in members)), ""),
        method=f"fused: {name}",
        config=tomlkit.dumps({"fusion": table}),
        licence=_joined(sorted({info.licence for info in infos})),
        version=__version__,
        concepts=json.dumps([entry for member in members for entry in provenance(member)]),
    )


def _joined(words) -> str:
    return ", ".join(word for word in words if word)


def provenance(member: Member) -> list[dict]:
    """One entry for a member's concept, or one for each concept of a member that is fused."""
    info = member.adapter.info
    if info.concepts:
        inner = json.loads(info.concepts)
        return [entry | {"weight": entry["weight"] * member.weight} for entry in inner]
    return [
        {
            "trigger": info.trigger,
            "class_noun": info.class_noun,
            "method": info.method,
            "ranks": member.adapter.ranks(),
            "weight": member.weight,
            "file": member.file.name,
            "tensors": member.digest,
            "licence": info.licence,
        }
    ]
