"""Discs in the place of emoji, which only `emoji.fetch` brings."""

import numpy as np
import pytest

from train.pocket import emoji, world


def disc_sprites(*names: str) -> emoji.Sprites:
    """A disc of its own colour for every noun, held-out emoji and further name, in all styles."""
    every = dict.fromkeys([*world.NOUNS.values(), *emoji.HELD_OUT, *names])
    keys = [(style, name) for style in emoji.SETS for name in every]
    pixels = np.zeros((len(keys), emoji.SIDE, emoji.SIDE, 4), np.uint8)
    y, x = np.mgrid[: emoji.SIDE, : emoji.SIDE]
    disc = (x - 64) ** 2 + (y - 64) ** 2 < 60**2
    for index, picture in enumerate(pixels):
        picture[disc] = (index % 256, 255 - index % 256, 90, 255)
    return emoji.Sprites(pixels, {key: (i, 128, 128) for i, key in enumerate(keys)})


def replace_sprites(monkeypatch: pytest.MonkeyPatch) -> emoji.Sprites:
    """Put discs in the place of the emoji, and return them."""
    found = disc_sprites()
    monkeypatch.setattr(emoji, "sprites", lambda: found)
    emoji.training_keys.cache_clear()
    return found
