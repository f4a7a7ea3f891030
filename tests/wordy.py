"""Learned words and short trainings of them, on random samples."""

import torch

from rite_diffusion.adapters import Adapter, AdapterInfo
from rite_diffusion.methods import METHODS
from rite_diffusion.photos.dataset import LatentSet
from rite_diffusion.training.settings import configure
from rite_diffusion.training.trainer import Job, Trainer
from runs import QUICK

PROMPT = "a <one> beside a <two> on a red background"
RATES = {"warmup": 0, "schedule": "constant"}


def random_words(backbone, layers, seed=0):
    """Two words with one and two vectors; of the second all layers have the same."""
    draws = torch.Generator().manual_seed(seed)
    widths = [table.shape[1] for table in backbone.token_tables]
    sizes = {"<one>": (layers, 1), "<two>": (1, 2)}
    return {
        word: [0.3 * torch.randn(*size, width, generator=draws) for width in widths]
        for word, size in sizes.items()
    }


def tokens_adapter(words):
    """An adapter of words alone."""
    tokens = {
        word + "@2" * number: rows for word, all in words.items() for number, rows in enumerate(all)
    }
    return Adapter([], AdapterInfo(trigger=", ".join(words)), tokens)


def random_data(backbone, captions, cells=(16, 16), masked=False) -> LatentSet:
    """One random sample per caption; masks cover the left half."""
    draws = torch.Generator().manual_seed(0)
    shape = (backbone.latent_channels, *cells)
    latents = [torch.randn(shape, generator=draws) for _ in captions]
    mask = torch.zeros(1, *cells)
    mask[..., : cells[1] // 2] = 1
    count = len(captions)
    return LatentSet(
        latents, [mask] * count if masked else None, list(range(count)), captions, [1.0] * count,
        [f"{index}.png" for index in range(count)],
    )  # fmt: skip


def wordy_config(method, trigger="<thing>", **settings):
    """A configuration without photos that adapts attention."""
    wanted = {"photos": "none", "trigger": trigger, "class_noun": "dog", "method": method}
    wanted |= QUICK | settings
    wanted["lora"] = {"layers": "attention"} | wanted.get("lora", {})
    return configure(wanted, "pocket")


def steps_of(backbone, config, masked=False, cells=(16, 16)):
    """The config's method, and a trainer of it on random samples."""
    captions = [f"a {config.trigger} on a red background", "a cat", f"a {config.trigger}"]
    method = METHODS[config.method](backbone, config)
    data = random_data(backbone, captions, cells, masked)
    return method, Trainer(Job(backbone, method, data, config))
