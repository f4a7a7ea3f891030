"""What the autoencoder is trained by besides pixels: random features and a patch critic."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def pixel_loss(output: Tensor, target: Tensor) -> Tensor:
    """L1 + MSE + L1 of the differences between neighbouring pixels."""
    edges = sum((output.diff(dim=d) - target.diff(dim=d)).abs().mean() for d in (-1, -2))
    return F.l1_loss(output, target) + F.mse_loss(output, target) + edges


class RandomFeatures(nn.Module):
    """Features of a convolutional network that nothing has trained.

    Distances in random features weigh edges and textures at several scales. A network trained to
    recognise things would do better, but the judge may not train what it scores, and no other one
    is at hand.
    """

    def __init__(self, widths: tuple[int, ...] = (16, 24, 32), seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        layers, before = [], 3
        for width in widths:
            layer = nn.Conv2d(before, width, 4, stride=2, padding=1)
            nn.init.orthogonal_(layer.weight, gain=2**0.5, generator=generator)
            nn.init.zeros_(layer.bias)
            layers.append(layer)
            before = width
        self.layers = nn.ModuleList(layers)
        self.requires_grad_(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Features (n, width, h, w) at 1/2, 1/4 and 1/8 of the images' size."""
        found = []
        for layer in self.layers:
            images = F.leaky_relu(layer(images), 0.2)
            found.append(images)
        return found

    def distance(self, output: Tensor, target: Tensor) -> Tensor:
        """Mean L1 distance of features, each level relative to the target's deviation."""
        with torch.no_grad():
            wanted = self(target)
        pairs = zip(self(output), wanted, strict=True)
        return torch.stack([F.l1_loss(a, b) / (b.std() + 1e-4) for a, b in pairs]).mean()


class PatchCritic(nn.Module):
    """Judges patches of a picture as real or reconstructed (Isola 2017), a logit per patch."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.utils.spectral_norm(nn.Conv2d(3, width, 4, stride=2, padding=1)),
            nn.LeakyReLU(0.2),
            nn.utils.spectral_norm(nn.Conv2d(width, 2 * width, 4, stride=2, padding=1)),
            nn.LeakyReLU(0.2),
            nn.utils.spectral_norm(nn.Conv2d(2 * width, 2 * width, 3, padding=1)),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 1, 3, padding=1),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Logits (n, 1, h/4, w/4)."""
        return self.layers(images)


def critic_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Hinge loss of the critic's logits."""
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()
