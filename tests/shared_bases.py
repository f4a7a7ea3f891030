"""Base models that the tests of one process share, and what says that a test left one as it was."""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from rite_diffusion.adapters.attach import detach
from rite_diffusion.backbones.source import load_backbone
from rite_diffusion.backbones.stable_diffusion import StableDiffusion

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
SWITCHES = ("training", "gradient_checkpointing", "processor", "_compiled_call_impl")
FACTS = ("name", "device", "dtype", "attention", "resolution", "fingerprint")


@dataclass
class Shared:
    """An open base, its weights when it was opened, and marks that are quick to compare."""

    backbone: StableDiffusion
    weights: dict[str, Tensor]
    marks: dict[str, object]
    versions: dict[str, int]


_lent: dict[str, Shared] = {}


def shared_base(source: str) -> StableDiffusion:
    """The one base of this process that is opened from here, in single precision.

    Who takes it leaves it as it was, but for adapters, which are taken out.
    """
    _lent[source] = _opened(source)
    return _lent[source].backbone


@cache
def _opened(source: str) -> Shared:
    backbone = load_backbone(source, "fp32")
    for name, encoder in parts(backbone).items():
        if name.startswith("text"):  # transformers puts hooks in when states are first asked for
            encoder(torch.tensor([[0]]), output_hidden_states=True)
    weights = {name: value.detach().clone() for name, value in tensors(backbone).items()}
    return Shared(backbone, weights, marks(backbone), versions(backbone))


def parts(backbone: StableDiffusion) -> dict[str, nn.Module]:
    """The networks of a base, the autoencoder too."""
    return {**backbone.components, "vae": backbone.vae}


def tensors(backbone: StableDiffusion) -> dict[str, Tensor]:
    """All parameters and buffers by name."""
    return {
        f"{part}.{name}": value
        for part, network in parts(backbone).items()
        for name, value in (*network.named_parameters(), *network.named_buffers())
    }


def versions(backbone: StableDiffusion) -> dict[str, int]:
    """How often each tensor was written to."""
    return {name: value._version for name, value in tensors(backbone).items()}


def marks(backbone: StableDiffusion) -> dict[str, object]:
    """Which objects a base is made of, how they are switched, and what it has been taught."""
    found: dict[str, object] = {
        f"{part}.{path}": (
            id(module),
            [len(getattr(module, hooks)) for hooks in HOOKS],
            [module.__dict__.get(switch) for switch in SWITCHES],
            "forward" in module.__dict__,
        )
        for part, network in parts(backbone).items()
        for path, module in network.named_modules()
    }
    for name, value in tensors(backbone).items():
        gradient = None if value.grad is None else "a gradient"
        found[name] = (id(value), value.data_ptr(), value.dtype, value.requires_grad, gradient)
    for part, network in parts(backbone).items():
        found[f"{part}, adapters"] = sorted(getattr(network, "peft_config", {}))
    facts = {name: str(getattr(backbone, name)) for name in FACTS}
    facts["released"] = str(backbone.parts.released)
    facts["limit"] = str(backbone.tokenizer.model_max_length)
    return found | facts | {"words": list(backbone.embeddings), "triggers": dict(backbone.triggers)}


def tidy(backbone: StableDiffusion) -> None:
    """Take out what a test attached, as a user would, which restores every bit."""
    names = {word.adapter for word in backbone.embeddings.values()} | {*backbone.triggers}
    for network in backbone.components.values():
        names |= {*getattr(network, "peft_config", {})}
    for name in names:
        detach(backbone, name)


def differences(base: Shared) -> list[str]:
    """What is no longer as it was when the base was opened; of weights, those that differ."""
    now = marks(base.backbone)
    found = [name for name in sorted({*now, *base.marks}) if now.get(name) != base.marks.get(name)]
    written = versions(base.backbone)
    for name, value in tensors(base.backbone).items():
        if name in base.weights and written[name] != base.versions[name]:
            if not torch.equal(value, base.weights[name]):
                found.append(f"{name} has other values")
    base.versions = written
    return found


def give_back() -> None:
    """Assert that the bases lent since the last call are as they were; of others, open new ones."""
    lent = list(_lent.values())
    _lent.clear()
    found = []
    try:
        for base in lent:
            tidy(base.backbone)
            found += differences(base)
        assert not found, f"the test left a shared base changed: {', '.join(found[:6])}"
    except BaseException:
        _opened.cache_clear()
        raise
