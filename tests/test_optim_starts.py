"""LoRA-RITE and LoRA-Muon from products that others split: by SVD, fused, converted, PiSSA-like.

A product's weak directions are what matters: both factors' steps meet there in a term of second
order, which without damping grows as their singular values fall.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from factors import ADAM, FAST, Factors
from rite_diffusion.adapters import lycoris
from rite_diffusion.fusion import low_rank
from rite_diffusion.fusion.layer import Factors as Product
from rite_diffusion.optim import LoraRite, lora_param_groups

OUT, INTO, RANK = 64, 96, 8
WEAK = [2.0, 1.0, 0.5, 0.2, 1e-2, 1e-3, 1e-5, 1e-6]


def random(*shape):
    return torch.randn(shape, dtype=torch.float64)


def spectral(values, split, shape=(OUT, INTO)):
    """(up, down) of these singular values, of which `up` has the powers `split`."""
    values = torch.tensor(values, dtype=torch.float64)
    left, right = (torch.linalg.qr(random(size, len(values)))[0] for size in shape)
    return left * values**split, (right * values ** (1 - split)).T


def fused(values=(0.5, 0.1)):
    """Two adapters' sum, cut to a rank as `rite fuse svd` does, one much weaker than the other."""
    pairs = [(random(OUT, 6) * size, random(6, INTO) / INTO**0.5) for size in values]
    ups, downs = zip(*pairs, strict=True)
    cut = low_rank.to_rank(Product(torch.cat(ups, 1), torch.cat(downs)), RANK)
    return cut.up, cut.down


def fused_twice():
    """An adapter and itself: half of the directions are rounding."""
    up, down = random(OUT, 4) * 0.3, random(4, INTO) / INTO**0.5
    cut = low_rank.to_rank(Product(torch.cat([up, up], 1), torch.cat([down, down])), 7)
    return cut.up, cut.down


def fused_by_gram():
    cut = low_rank.factorised(random(OUT, 3) @ random(3, INTO) / INTO**0.5, RANK)
    return cut.up, cut.down


def loha():
    """A Hadamard product of two rank-3 products, one of them hardly trained."""
    parts = {"hada_w1_a": random(OUT, 3), "hada_w1_b": random(3, INTO) / INTO**0.5}
    parts |= {"hada_w2_a": random(OUT, 3) * 1e-2, "hada_w2_b": random(3, INTO)}
    product = lycoris.loha(parts)
    return product.left, product.right


def dense():
    """A dense difference as a product with the identity."""
    product = lycoris.whole(random(16, 24) / 10)
    return product.left, product.right


def pissa():
    """The leading part of a weight, split evenly (Meng et al. 2024)."""
    left, values, right = torch.linalg.svd(random(OUT, INTO) / INTO**0.5)
    root = values[:RANK].sqrt()
    return left[:, :RANK] * root, root[:, None] * right[:RANK]


def milora():
    """The least part of a weight of falling spectrum, split evenly (Wang et al. 2024)."""
    return spectral(torch.logspace(-3, -6, RANK).tolist(), 0.5)


STARTS = {
    "split evenly": lambda: spectral(WEAK, 0.5),
    "all in up": lambda: spectral(WEAK, 1.0),
    "all in down": lambda: spectral(WEAK, 0.0),
    "exactly lost": lambda: spectral([2.0, 1.0, 0.5, 0.2, 0.0, 0.0, 0.0, 0.0], 0.5),
    "a step's size": lambda: spectral([2.0, 1.0, 0.5, 0.2, 1e-2, 1e-2, 1e-3, 1e-3], 0.5),
    "fused": fused,
    "fused twice": fused_twice,
    "fused by gram": fused_by_gram,
    "LoHa": loha,
    "dense difference": dense,
    "PiSSA": pissa,
    "MiLoRA": milora,
    "no up": lambda: (torch.zeros(OUT, RANK), random(RANK, INTO) / INTO**0.5),
    "no down": lambda: (random(OUT, RANK) / RANK**0.5, torch.zeros(RANK, INTO)),
}


class Layer(nn.Module):
    """A LoRA layer with these factors, of whose product a part remains to be learned."""

    def __init__(self, start, dtype=torch.float32, kernel=None):
        super().__init__()
        torch.manual_seed(0)
        up, down = (factor.double() for factor in STARTS[start]())
        change = 0.3 * random(len(up), 2) @ random(2, down.shape[1]) / down.shape[1] ** 0.5
        self.target = up @ down + change
        if kernel:
            up, down = up[..., None, None], down.unflatten(1, (-1, kernel, kernel))
        self.lora_A, self.lora_B = (nn.Parameter(f.to(dtype).clone()) for f in (down, up))

    def product(self):
        return self.lora_B.flatten(1) @ self.lora_A.flatten(1)

    def train_with(self, optimizer, steps=60):
        """Losses on batches of 16 inputs with noise."""
        draws, losses = torch.Generator().manual_seed(1), []
        for _ in range(steps):
            x = torch.randn(16, self.target.shape[1], generator=draws)
            noise = 0.1 * torch.randn(16, len(self.target), generator=draws)
            error = x.to(self.lora_A.dtype) @ (self.product() - self.target.to(self.lora_A)).T
            loss = (error + noise).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    def distance(self):
        return (self.product().detach().double() - self.target).norm().item()


RATES = [("rite", 1e-4), ("rite", 1e-3), ("rite", 1e-2)]
RATES += [("lora_muon", 1e-2), ("lora_muon", 3e-2), ("lora_muon", 1e-1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("name", "lr"), RATES)
@pytest.mark.parametrize("start", STARTS)
def test_every_start_is_learned_from_without_a_leap(start, name, lr, dtype):
    layer = Layer(start, dtype)
    before = layer.distance()
    losses = layer.train_with(FAST[name](lora_param_groups(layer), lr=lr))
    adam = Layer(start, dtype)
    by_adam = adam.train_with(ADAM(adam.parameters(), lr=1e-4, weight_decay=0.0))
    assert max(losses) < 1.1 * max(by_adam)
    assert layer.distance() < before


@pytest.mark.parametrize(("name", "lr"), [("rite", 1e-3), ("lora_muon", 1e-1)])
@pytest.mark.parametrize("start", ["split evenly", "MiLoRA"])
def test_without_damping_such_a_start_leaps(start, name, lr):
    layer = Layer(start)
    losses = layer.train_with(FAST[name](lora_param_groups(layer), lr=lr, core_damping=0.0))
    assert max(losses) > 10


@pytest.mark.parametrize("name", ["rite", "lora_muon"])
@pytest.mark.parametrize("start", ["split evenly", "all in down", "exactly lost", "no down"])
def test_convolutions_are_damped_as_matrices_are(start, name):
    layer, flat = Layer(start, kernel=4), Layer(start)
    losses, expected = (
        each.train_with(FAST[name](lora_param_groups(each), lr=1e-2)) for each in (layer, flat)
    )
    assert losses == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("lr", [1e-3, 1e-2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rank_above_the_gradients_leaves_no_huge_factor(dtype, lr):
    """Layers that read the time step: as many different inputs as the batch has members."""
    torch.manual_seed(0)
    down = nn.Parameter((torch.randn(16, 64) / 8).to(dtype))
    up = nn.Parameter(torch.zeros(96, 16, dtype=dtype))
    optimizer = LoraRite([("a.lora_A", down), ("a.lora_B", up)], lr=lr)
    target, losses = torch.randn(96, 64) / 16, []
    for _ in range(200):
        x = torch.randn(4, 64)
        loss = F.mse_loss((x.to(dtype) @ down.T @ up.T).float(), x @ target.T)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert max(losses) < 1.5 * losses[0] and sum(losses[-20:]) / 20 < 0.8 * losses[0]
    assert down.norm() < 100


@pytest.mark.parametrize("name", ["rite", "lora_muon"])
@pytest.mark.parametrize("values", [WEAK[:3], [1.0, 1e-3, 1e-6]])
def test_products_with_weak_directions_do_not_depend_on_their_split(values, name):
    def products(split, mixing):
        torch.manual_seed(0)
        model = Factors([(24, 40), (40, 24)], rank=3)
        with torch.no_grad():
            for down, up in model.pairs():
                new_up, new_down = spectral(values, split, (len(up), down.shape[1]))
                up.copy_(new_up @ mixing)
                down.copy_(torch.linalg.solve(mixing, new_down))
        model.run(FAST[name](lora_param_groups(model), lr=1e-2), 50)
        return torch.cat([product.flatten() for product in model.products()])

    even = products(0.5, torch.eye(3, dtype=torch.float64))
    for split in (0.0, 0.3, 1.0):
        mixing = torch.tensor([[3.0, 1, 0], [0, 0.2, 0], [0, 5, 10]], dtype=torch.float64)
        torch.testing.assert_close(products(split, mixing), even, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("name", FAST)
def test_a_rate_of_zero_is_harmless(name):
    for start in ("no up", "no down", "split evenly"):
        layer = Layer(start)
        before = layer.product().detach().clone()
        optimizer = FAST[name](lora_param_groups(layer), lr=0.0)
        layer.train_with(optimizer, 2)
        assert torch.equal(layer.product(), before)
        optimizer.param_groups[0]["lr"] = 1e-3
        layer.train_with(optimizer, 2)
        assert not torch.equal(layer.product(), before)
