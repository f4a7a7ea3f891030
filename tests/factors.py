"""LoRA factors to be fitted, and the optimizers that fit them."""

import torch
from torch import nn
from torch.nn import functional as F

from rite_diffusion.optim import LoraMuon, LoraRite, ScaledAdamW, ScaledSGD

FAST = {
    "lora_muon": LoraMuon,
    "rite": LoraRite,
    "scaled_adamw": ScaledAdamW,
    "scaled_sgd": ScaledSGD,
}
ADAM = torch.optim.AdamW


class Factors(nn.Module):
    """LoRA pairs of given (out, in) shapes and one bias, to be fitted to random targets."""

    def __init__(self, shapes, rank, dtype=torch.float64, zero_up=False):
        super().__init__()
        torch.manual_seed(0)
        for index, (rows, columns) in enumerate(shapes):
            down = torch.randn(rank, columns, dtype=torch.float64) / columns**0.5
            up = torch.randn(rows, rank, dtype=torch.float64) / rank**0.5
            pair = nn.ParameterDict({"lora_A": down, "lora_B": up * (not zero_up)})
            self.add_module(f"layer{index}", pair.to(dtype))
        self.bias = nn.Parameter(torch.zeros(3, dtype=dtype))
        self.targets = [torch.randn(shape, dtype=torch.float64) for shape in shapes]

    def pairs(self):
        layers = [m for m in self.children() if isinstance(m, nn.ParameterDict)]
        return [(layer["lora_A"], layer["lora_B"]) for layer in layers]

    def products(self):
        return [(up.detach() @ down.detach()).double() for down, up in self.pairs()]

    def loss(self):
        fit = [
            F.mse_loss(up @ down, target.to(up.dtype))
            for (down, up), target in zip(self.pairs(), self.targets, strict=True)
        ]
        return sum(fit) + (self.bias - 1).square().sum()

    def run(self, optimizer, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            self.loss().backward()
            optimizer.step()
        return self
