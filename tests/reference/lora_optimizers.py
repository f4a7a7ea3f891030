"""The LoRA-aware optimizers one pair at a time, literally as their papers write them.

Linear algebra here is what the papers name (QR, pseudo-inverse, eigenvalues), never what the fast
versions use.
"""

import math

import torch
from torch import Tensor


class Pair:
    """down A (r, in), up B (out, r), and whatever an optimizer remembers of them."""

    def __init__(self, down: Tensor, up: Tensor):
        self.down, self.up, self.memory, self.step = down.clone(), up.clone(), {}, 0

    @property
    def product(self) -> Tensor:
        return self.up @ self.down


def riemannian(pair: Pair, g_down: Tensor, g_up: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    identity = damping * torch.eye(len(pair.down), dtype=g_up.dtype)
    return (
        torch.linalg.inv(pair.up.T @ pair.up + identity) @ g_down,
        g_up @ torch.linalg.inv(pair.down @ pair.down.T + identity),
    )


def scaled_sgd(pairs, gradients, lr=1e-2, damping=1e-6, momentum=0.0, weight_decay=0.0):
    for pair, (g_down, g_up) in zip(pairs, gradients, strict=True):
        directions = riemannian(pair, g_down, g_up, damping)
        for name, direction in zip(("down", "up"), directions, strict=True):
            velocity = momentum * pair.memory.get(name, 0.0) + direction
            pair.memory[name] = velocity
            value = getattr(pair, name)
            setattr(pair, name, value - lr * velocity - lr * weight_decay * value)


def scaled_adamw(
    pairs, gradients, lr=1e-3, damping=1e-6, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0
):
    for pair, (g_down, g_up) in zip(pairs, gradients, strict=True):
        pair.step += 1
        directions = riemannian(pair, g_down, g_up, damping)
        for name, g in zip(("down", "up"), directions, strict=True):
            first, second = pair.memory.get(name, (torch.zeros_like(g), torch.zeros_like(g)))
            first = betas[0] * first + (1 - betas[0]) * g
            second = betas[1] * second + (1 - betas[1]) * g * g
            pair.memory[name] = first, second
            value = getattr(pair, name)
            m = first / (1 - betas[0] ** pair.step)
            v = second / (1 - betas[1] ** pair.step)
            value = value - lr * weight_decay * value - lr * m / (v.sqrt() + eps)
            setattr(pair, name, value)


def rite(
    pairs, gradients, lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0,
    clip_unmagnified=1.0, skip_rms=1.0, escape=False, core_damping=1.0,
):  # fmt: skip
    prepared = [_unmagnified(pair, *g, skip_rms) for pair, g in zip(pairs, gradients, strict=True)]
    norm = math.sqrt(sum(side[3].square().sum().item() for sides in prepared for side in sides))
    scale = min(1.0, clip_unmagnified / norm) if clip_unmagnified and norm else 1.0
    for pair, sides in zip(pairs, prepared, strict=True):
        pair.step += 1
        decay = [b * (1 - b ** (pair.step - 1)) / (1 - b**pair.step) for b in betas]
        moved = {}
        for name, rows, basis, gradient, triangle in sides:
            gradient, n, r = gradient * scale, *gradient.shape
            past = (torch.zeros(n, r, dtype=rows.dtype), torch.zeros(r, r, dtype=rows.dtype), basis)
            momentum, second, old_basis, rho = (*pair.memory.get(name, (*past, 0.0)),)
            turn = basis.T @ old_basis
            turned = turn @ second @ turn.T
            if escape:
                rho = decay[1] * (rho + _escaped(second, turned))
            second = decay[1] * turned + (1 - decay[1]) * gradient.T @ gradient / n
            values, vectors = torch.linalg.eigh(second)
            root = (values.clamp(min=0) + rho + eps**2).sqrt() + eps
            preconditioned = gradient @ vectors @ torch.diag(1 / root) @ vectors.T
            momentum = decay[0] * momentum @ turn.T + (1 - decay[0]) * preconditioned
            pair.memory[name] = momentum, second, basis, rho
            back = torch.linalg.pinv(triangle).T
            if name == "down":
                reach = core_damping * lr * math.sqrt(min(pair.product.shape))
                back = _damped(triangle, sides[1][4], reach, back)
            moved[name] = rows - lr * momentum @ back - lr * weight_decay * rows
        pair.down, pair.up = moved["down"].T, moved["up"]


def lora_muon(
    pairs, gradients, lr=0.1, momentum=0.9, weight_decay=0.0, sign_eps=1e-3, core_damping=1.0,
):  # fmt: skip
    keep = math.sqrt(1 - lr * weight_decay)
    for pair, (g_down, g_up) in zip(pairs, gradients, strict=True):
        roots = {"down": _root(pair.down.T), "up": _root(pair.up)}
        moved = {}
        for name, rows, gradient, partner in (
            ("down", pair.down.T, g_down.T, "up"),
            ("up", pair.up, g_up, "down"),
        ):
            average = momentum * pair.memory.get(name, 0.0) + (1 - momentum) * gradient
            pair.memory[name] = average
            inverse = back = torch.linalg.pinv(roots[partner], hermitian=True)
            if name == "down":
                back = _damped(roots["up"], roots["down"], core_damping * lr / 2, inverse)
            left, sizes, right = torch.linalg.svd(average @ inverse, full_matrices=False)
            floor = (sign_eps * sizes.max()).clamp(min=1e-150)
            sign = left @ torch.diag(sizes / (sizes**2 + floor**2).sqrt()) @ right
            moved[name] = keep * rows - lr / (2 * keep) * sign @ back
        pair.down, pair.up = moved["down"].T, moved["up"]


def _root(rows: Tensor) -> Tensor:
    """(X^T X)^(1/2)."""
    _, sizes, right = torch.linalg.svd(rows, full_matrices=False)
    return right.T @ torch.diag(sizes) @ right


def _damped(up: Tensor, down: Tensor, reach: float, back: Tensor) -> Tensor:
    """What brings the direction of `down` back to its entries; of both triangles of QR."""
    left, sizes, _ = torch.linalg.svd(up @ down.T)
    damping = left @ torch.diag(sizes**2 / (sizes**2 + reach**2).clamp(min=1e-300)) @ left.T
    lost = torch.eye(len(down), dtype=down.dtype) - torch.linalg.pinv(down) @ down
    return damping @ back + torch.linalg.pinv(up @ lost, atol=1e-8 * up.norm(), rtol=0.0).T


def _unmagnified(pair, g_down, g_up, skip_rms):
    sides = []
    for name, rows, partner, gradient in (
        ("down", pair.down.T, pair.up, g_down.T),
        ("up", pair.up, pair.down.T, g_up),
    ):
        basis, triangle = torch.linalg.qr(partner)
        unmagnified = gradient @ torch.linalg.pinv(triangle)
        if skip_rms and unmagnified.square().mean().sqrt() > skip_rms:
            unmagnified = torch.zeros_like(unmagnified)
        sides.append((name, rows, basis, unmagnified, triangle))
    return sides


def _escaped(before: Tensor, after: Tensor) -> float:
    gaps = torch.linalg.eigvalsh(before) - torch.linalg.eigvalsh(after)
    return min(max(gaps.max().item(), 0.0), max((before.trace() - after.trace()).item(), 0.0))
