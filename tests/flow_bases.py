"""Open tiny bases of the flow-matching families, and random adapters for them."""

from functools import cache

import torch

from flow_models import PIPELINES, with_random_weights
from rite_diffusion.adapters import Adapter, AdapterInfo
from rite_diffusion.adapters.names import module_name
from rite_diffusion.backbones.families import family_of
from rite_diffusion.types import LoraPair

SIDE = 64  # pixels of the pictures that are drawn


def opened(pipeline, name="tiny"):
    """A backbone of a pipeline."""
    return family_of(pipeline)(pipeline, name, torch.device("cpu"), "sdpa", lambda: None)


@cache
def family(name):
    """The one base of a family in this process; who takes it leaves it as it was."""
    torch.manual_seed(0)
    return opened(with_random_weights(PIPELINES[name]()), name)


def latents_of(base, count=1, seed=5):
    """Random latents (count, C, h, w) of pictures of SIDE pixels."""
    cells = SIDE // base.pixels_per_latent
    shape = (count, base.latent_channels, cells, cells)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def adapter_on(base, paths=None, stated=True, seed=0):
    """A random adapter of unequal ranks and scales on a base's layers."""
    torch.manual_seed(seed)
    pairs = []
    for number, path in enumerate(paths or base.lora_targets("transformer", blocks=True)):
        weight = base.transformer.get_submodule(path).weight
        rank = 1 + number % 3
        down, up = torch.randn(rank, weight.shape[1]), torch.randn(weight.shape[0], rank)
        pairs.append(LoraPair(module_name("transformer", path), down, up, 0.5 + number % 4))
    return Adapter(pairs, AdapterInfo(trigger="<x>", family=base.family if stated else ""))
