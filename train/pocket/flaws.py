"""What may be wrong with pictures (n, 3, SIZE, SIZE) in [-1, 1]: what a judge forgives, and flaws.

A flaw returns the poor pictures and the cosines (n,) to the good ones that they deserve.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .world import SIZE

FORGIVEN_BLUR = 0.6  # pixels


def uniform(n: int, low: float, high: float) -> Tensor:
    """One number per picture, (n, 1, 1, 1)."""
    return torch.empty(n, 1, 1, 1).uniform_(low, high)


def blurred(pixels: Tensor, sigma: Tensor) -> Tensor:
    """Pictures after a Gaussian blur of `sigma` (n, 1, 1, 1) pixels, mirrored at the border."""
    pad = 16
    wide = F.pad(pixels, (pad,) * 4, mode="reflect")
    size = wide.shape[-1]
    squared = torch.fft.fftfreq(size)[:, None] ** 2 + torch.fft.rfftfreq(size)[None] ** 2
    response = torch.exp(-2 * (torch.pi * sigma) ** 2 * squared)
    soft = torch.fft.irfft2(torch.fft.rfft2(wide) * response, s=wide.shape[-2:])
    return soft[..., pad:-pad, pad:-pad]


def forgiven(pixels: Tensor) -> Tensor:
    """Pictures with what a person forgives: colours a little off, slight blur, mild noise."""
    n = len(pixels)
    mixing = torch.eye(3) + 0.02 * torch.randn(n, 3, 3)
    pixels = (mixing @ pixels.flatten(2)).view_as(pixels)
    pixels = pixels * uniform(n, 0.85, 1.12) + uniform(n, -0.1, 0.1)
    some = torch.randperm(n)[: n // 2]
    pixels[some] = blurred(pixels[some], uniform(len(some), 0, FORGIVEN_BLUR))
    noise = uniform(n, -0.06, 0.06).clamp(min=0)
    return pixels + noise * torch.randn_like(pixels)


def fall(amount: Tensor, scale: float, power: float) -> Tensor:
    """The cosine that a flaw of this amount deserves: 1 at 0, 1 / e at `scale`."""
    return torch.exp(-((amount / scale) ** power)).flatten()


def blur_deserves(sigma: Tensor) -> Tensor:
    """Deserved cosines (n,) of pictures blurred by `sigma` pixels: 0.7 at 1.2, 0.25 at 3."""
    return fall(sigma, 2.4, 1.5)


def soft(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Blurred pictures and the cosines they deserve."""
    sigma = uniform(len(pixels), 0.8, 4.5)
    return blurred(pixels, sigma), blur_deserves(sigma)


def coarse(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Pictures that were made small and large again, and the cosines they deserve."""
    found, factors = [], uniform(len(pixels), 1.8, 9)
    for picture, factor in zip(pixels, factors.flatten().tolist(), strict=True):
        small = F.interpolate(picture[None], round(SIZE / factor), mode="bilinear", antialias=True)
        found.append(F.interpolate(small, SIZE, mode="bilinear"))
    return torch.cat(found), blur_deserves(0.5 * factors)


def blotchy(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Pictures with blotches of 4 to 16 pixels, and the cosines they deserve."""
    amount = 0.05 + 0.4 * uniform(len(pixels), 0, 1) ** 2
    cells = int(torch.randint(8, 33, ()))
    blotches = F.interpolate(torch.randn(len(pixels), 3, cells, cells), SIZE, mode="bicubic")
    grey = uniform(len(pixels), 0, 1)  # how much the blotches lack colour
    blotches = blotches + grey * (blotches.mean(1, keepdim=True) * 3**0.5 - blotches)
    return pixels + amount * blotches, fall(amount, 0.22, 1.2)


def bent(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Pictures whose shapes are bent by some pixels, and the cosines they deserve."""
    n = len(pixels)
    amount = uniform(n, 0.8, 6)
    cells = int(torch.randint(5, 11, ()))
    shift = F.interpolate(torch.randn(n, 2, cells, cells), SIZE, mode="bicubic")
    identity = torch.eye(2, 3).expand(n, 2, 3)
    grid = F.affine_grid(identity, list(pixels.shape), align_corners=False)
    grid = grid + (amount * shift).permute(0, 2, 3, 1) * 2 / SIZE
    moved = F.grid_sample(pixels, grid, padding_mode="reflection", align_corners=False)
    return moved, fall(amount, 3.2, 1.3)


FLAWS = (soft, coarse, blotchy, bent)


def poor(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Pictures with one or two flaws of random kinds, and the cosines they deserve."""
    order = torch.randperm(len(pixels))
    pixels, deserved = pixels.clone(), torch.ones(len(pixels))
    for rows, flaw in zip(order.tensor_split(len(FLAWS) + 1), (*FLAWS, soft), strict=True):
        pixels[rows], deserved[rows] = flaw(pixels[rows])
    for rows, flaw in ((order[-2:], blotchy), (order[:2], bent)):  # a few have two
        pixels[rows], second = flaw(pixels[rows])
        deserved[rows] *= second
    return pixels, deserved
