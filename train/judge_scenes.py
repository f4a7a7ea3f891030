"""What the judge is trained on: scenes of nouns, of every emoji and of made-up drawings.

A batch is composed anew at every step, by other code than the base model's scenes, and then
distorted: the judge has to name soft, blotchy and slightly bent pictures, because that is what a
small generator draws.
"""

from functools import cache

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor
from torch.nn import functional as F

import world

NOUNS, COLOURS = tuple(world.NOUNS), tuple(world.COLOURS)
SEED = 900_000
DRAWINGS = 400  # made-up drawings among the classes of the embedding
UNKNOWN = -1  # label of a question that a picture does not answer

# Where an object stands: x in pixels, longer side in pixels, share of the scenes.
PLACES = torch.tensor([[32, 48, 0.55], [32, 26, 0.15], [17, 29, 0.15], [47, 29, 0.15]])
LEFT, RIGHT = 2, 3  # rows of PLACES


# --- sprites -----------------------------------------------------------------------------------


def part(rng: np.random.Generator, colour: tuple[int, int, int], is_body: bool) -> Image.Image:
    """One ellipse, box or polygon on a transparent square of 96 pixels."""
    layer = Image.new("RGBA", (96, 96))
    pen = ImageDraw.Draw(layer)
    centre = 48 + (rng.normal(0, 3, 2) if is_body else rng.uniform(-32, 32, 2))
    reach = rng.uniform(24, 42, 2) if is_body else rng.uniform(4, 20, 2)
    box = [*(centre - reach), *(centre + reach)]
    outline = (30, 20, 20) if rng.random() < 0.3 else None
    match rng.integers(3):
        case 0:
            pen.ellipse(box, colour, outline, 2)
        case 1:
            pen.rounded_rectangle(box, min(reach) / 2, colour, outline, 2)
        case _:
            corners = centre + reach * rng.uniform(-1, 1, (int(rng.integers(3, 7)), 2))
            pen.polygon([tuple(corner) for corner in corners], colour, outline)
    return layer


def drawing(seed: int) -> Image.Image:
    """A made-up RGBA figure: a body with parts in a few colours, many of them mirrored."""
    rng = np.random.default_rng([SEED, seed])
    palette = [tuple(int(c) for c in rng.integers(0, 256, 3)) for _ in range(rng.integers(2, 5))]
    figure = Image.new("RGBA", (96, 96))
    for index in range(rng.integers(3, 9)):
        layer = part(rng, palette[index % len(palette)], is_body=index == 0)
        figure.alpha_composite(layer)
        if rng.random() < 0.6:
            figure.alpha_composite(ImageOps.mirror(layer))
    return figure.crop(figure.getbbox())


@cache
def emoji_names() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Short names of emoji to train on, and of those kept aside to calibrate the threshold.

    Neither has the held-out emoji, which test the judge; the second has no nouns.
    """
    nouns = set(world.NOUNS.values())
    spare = sorted(set(world.all_names()) - nouns)
    aside = spare[::16]
    return tuple(sorted(nouns.union(spare).difference(aside))), tuple(aside)


def in_each_style(names: tuple[str, ...]) -> dict[tuple[str, str], Image.Image]:
    """Sprites by (short name, style), where a style has one."""
    found = {(name, style): world.sprite(name, style) for name in names for style in world.STYLES}
    return {key: image for key, image in found.items() if image is not None}


@cache
def identities() -> dict[tuple[str, str], Image.Image]:
    """The classes of the embedding: each emoji in each style, and the drawings."""
    drawings = {(f"drawing {seed}", "drawn"): drawing(seed) for seed in range(DRAWINGS)}
    return in_each_style(emoji_names()[0]) | drawings


@cache
def sprite_bank() -> tuple[Tensor, Tensor]:
    """Premultiplied RGBA squares (2, classes, 4, 64, 64) in [0, 1], and nouns' classes (64, 2).

    The second set of squares is smooth, for drawing small without aliasing.
    """
    squares = []
    for image in identities().values():
        square = Image.new("RGBA", (max(image.size),) * 2)
        square.paste(image, tuple((square.width - side) // 2 for side in image.size))
        square = square.resize((world.SIZE, world.SIZE), Image.Resampling.LANCZOS)
        squares.append(torch.from_numpy(np.array(square)).permute(2, 0, 1))
    bank = torch.stack(squares).float() / 255
    bank[:, :3] *= bank[:, 3:]
    row = {key: index for index, key in enumerate(identities())}
    classes = [[row[name, style] for style in world.STYLES] for name in world.NOUNS.values()]
    return torch.stack([bank, F.avg_pool2d(bank, 3, 1, 1)]), torch.tensor(classes)


# --- scenes ------------------------------------------------------------------------------------


def uniform(n: int, low: float, high: float) -> Tensor:
    """One number per picture, (n, 1, 1, 1)."""
    return torch.empty(n, 1, 1, 1).uniform_(low, high)


def grounds(colours: Tensor) -> Tensor:
    """Backgrounds (n, 3, 64, 64) in [0, 1] of the colours with these indices (n,)."""
    n = len(colours)
    tint = torch.tensor(list(world.COLOURS.values()))[colours] / 255 + 0.025 * torch.randn(n, 3)
    ramp = torch.linspace(-1, 1, world.SIZE)
    slope = 0.04 * torch.randn(2, n, 1, 1, 1)
    return tint[..., None, None] + slope[0] * ramp[:, None] + slope[1] * ramp


def pasted(canvas: Tensor, sprites: Tensor, places: Tensor) -> Tensor:
    """Canvases (n, 3, 64, 64) with sprites drawn over them, shifted, turned and bent a little.

    `sprites` is (n, 4, 64, 64), `places` (n, 3) rows of PLACES.
    """
    n = len(canvas)
    x, extent = places[:, :1], places[:, 1:2] * torch.empty(n, 1).uniform_(0.87, 1.13)
    centre = torch.cat([x, torch.full_like(x, 32)], 1) + torch.empty(n, 2).uniform_(-3.5, 3.5)
    centre = centre / 32 - 1  # in [-1, 1] over the canvas
    angle = torch.empty(n, 1).uniform_(-0.15, 0.15)
    rows = torch.cat([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(n, 2, 2)
    turn = rows * (world.SIZE / extent)[..., None]  # canvas to sprite coordinates
    grid = F.affine_grid(torch.cat([turn, -turn @ centre[..., None]], 2), [n, 4, 64, 64], False)
    wobble = F.interpolate(torch.randn(n, 2, 6, 6), world.SIZE, mode="bilinear")
    grid = grid + uniform(n, 0, 0.06) * wobble.permute(0, 2, 3, 1)
    layer = F.grid_sample(sprites, grid, align_corners=False)
    return canvas * (1 - layer[:, 3:]) + layer[:, :3]


def random_scenes(count: int) -> tuple[Tensor, dict[str, Tensor]]:
    """A batch (count, 3, 64, 64) in [-1, 1], and indices (count,) of the answers or UNKNOWN.

    An eighth shows one noun, an eighth two, and the rest any identity.
    """
    bank, of_noun = sprite_bank()
    kind = torch.arange(count) * 8 // count
    is_single, is_pair, is_any = kind == 0, kind == 1, kind > 1
    noun = torch.randint(len(NOUNS), (count,))
    second = (noun + torch.randint(1, len(NOUNS), (count,))) % len(NOUNS)
    style = torch.randint(len(world.STYLES), (count,))
    identity = of_noun[noun, style].where(~is_any, torch.randint(bank.shape[1], (count,)))
    colour = torch.randint(len(COLOURS), (count,))
    place = torch.multinomial(PLACES[:, 2], count, replacement=True).where(~is_pair, LEFT)
    canvas = pasted(grounds(colour), bank[(place > 0).long(), identity], PLACES[place])
    others = bank[1, of_noun[second, style][is_pair]]
    canvas[is_pair] = pasted(canvas[is_pair], others, PLACES[[RIGHT]].expand(len(others), 3))
    known = {
        "noun": (noun, is_single),
        "left": (noun, ~is_any & (place == LEFT)),
        "right": (second.where(is_pair, noun), is_pair | (is_single & (place == RIGHT))),
        "identity": (identity, ~is_pair),
        "colour": (colour, torch.ones_like(is_pair)),
    }
    labels = {name: value.where(is_known, UNKNOWN) for name, (value, is_known) in known.items()}
    return distorted(canvas * 2 - 1), labels


# --- distortions of a batch (n, 3, 64, 64) in [-1, 1] ------------------------------------------


def blurred(pixels: Tensor, sigma: Tensor) -> Tensor:
    """Pictures after a Gaussian blur of `sigma` (n, 1, 1, 1) pixels, periodic at the border."""
    size = pixels.shape[-1]
    squared = torch.fft.fftfreq(size)[:, None] ** 2 + torch.fft.rfftfreq(size)[None] ** 2
    response = torch.exp(-2 * (torch.pi * sigma) ** 2 * squared)
    return torch.fft.irfft2(torch.fft.rfft2(pixels) * response, s=pixels.shape[-2:])


def recoloured(pixels: Tensor) -> Tensor:
    """Pictures with other contrast, brightness and a slight mixing of their channels."""
    n = len(pixels)
    mixing = torch.eye(3) + 0.04 * torch.randn(n, 3, 3)
    mixed = (mixing @ pixels.flatten(2)).view_as(pixels)
    return mixed * uniform(n, 0.85, 1.15) + uniform(n, -0.1, 0.1)


def noisy(pixels: Tensor) -> Tensor:
    """Pictures with blotches of about eight pixels and with fine noise."""
    n = len(pixels)
    blotches = F.interpolate(torch.randn(n, 3, 8, 8), world.SIZE, mode="bilinear")
    fine = torch.rand_like(pixels) - 0.5
    return pixels + uniform(n, 0, 0.1) * blotches + uniform(n, 0, 0.3) * fine


def compressed(pixels: Tensor, step: Tensor) -> Tensor:
    """Pictures after JPEG's loss: rounded 8x8 cosine transforms, `step` (n, 1, 1, 1) coarse."""
    n, wave = len(pixels), torch.arange(8.0)
    cosines = torch.cos(torch.pi / 8 * wave[:, None] * (wave + 0.5)) / 2
    cosines[0] /= 2**0.5  # now orthonormal
    coarseness = step[..., None, None] * (1 + wave[:, None] + wave)
    blocks = pixels.view(n, 3, 8, 8, 8, 8).transpose(3, 4)  # (n, 3, rows, columns, 8, 8)
    rounded = (cosines @ blocks @ cosines.T / coarseness).round() * coarseness
    return (cosines.T @ rounded @ cosines).transpose(3, 4).reshape_as(pixels)


def distorted(pixels: Tensor) -> Tensor:
    """The batch, each picture as poor as a generator, a camera or a file might make it."""
    n = len(pixels)
    sigma = uniform(n, -0.5, 2.0).clamp(min=0)  # a fifth stay sharp
    pixels = noisy(recoloured(blurred(pixels, sigma)))
    quarter = n // 4
    order = torch.randperm(n)
    some = order[:quarter]
    pixels[some] = compressed(pixels[some], uniform(quarter, 0.01, 0.06))
    return pixels.clamp(-1, 1)
