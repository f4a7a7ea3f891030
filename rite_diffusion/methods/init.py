"""Starts of LoRA pairs that look at the base's weights or at the gradient: `lora.init`.

`pissa` (Meng et al. 2024, arXiv 2404.02948): the pairs hold the leading directions of the weights
W, and the rest of W is frozen. Here W stays whole, and the pairs' start is subtracted beside it:

    W x + scale (up down - up0 down0) x,    scale up0 down0 = the best approximation of W of rank r

so that the update is a pair of rank 2r over the untouched base.

`lora_one` (Zhang et al. 2025, arXiv 2502.01235): the pairs start as the leading directions of one
step of gradient descent on the whole weights, the step's spectral norm being `size`:

    scale up0 down0 = -size U_r (S_r / S_1) V_r^T,    U S V^T = the loss's gradient by W
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rite_diffusion.adapters.attach import base_layer, lora_layers, read_pairs
from rite_diffusion.backbones.protocols import Backbone
from rite_diffusion.errors import OptimizerError
from rite_diffusion.optim.basis import precise
from rite_diffusion.types import LoraPair

NEGLIGIBLE = 1e-6  # singular values below this share of the largest are no directions to start in


def leading(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `rank` leading singular triples (out, r), (r,), (r, in) of a matrix (out, in).

    From the eigenvectors of the smaller Gram matrix, in float64 where the device has it.
    """
    if matrix.shape[0] > matrix.shape[1]:
        right, values, left = leading(matrix.mT, rank)
        return left.mT, values, right.mT
    matrix = precise(matrix)
    squares, vectors = torch.linalg.eigh(matrix @ matrix.mT)
    left, values = vectors[:, -rank:].flip(1), squares[-rank:].flip(0).clamp(min=0).sqrt()
    smallest = torch.finfo(values.dtype).tiny
    return left, values, (left.mT @ matrix) / values.clamp(min=smallest)[:, None]


@torch.no_grad()
def set_product(pair: LoraPair, left: Tensor, values: Tensor, right: Tensor) -> None:
    """Set a pair's factors to scale up down = left diag(values) right, split evenly.

    Directions whose value is negligible keep `down`, and their `up` is zero.
    """
    root = (values / pair.scale).sqrt()
    kept = values > NEGLIGIBLE * values.max()
    up = (left * root.where(kept, 0.0)).to(pair.up)
    down = (right * root[:, None]).to(pair.down)
    pair.up.copy_(up.reshape(pair.up.shape))
    pair.down.copy_(torch.where(kept[:, None], down, pair.down.flatten(1)).reshape(pair.down.shape))


def _layers(backbone: Backbone, name: str) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """Module name in files, LoRA layer and base's layer of an adapter's layers."""
    for module, layer in lora_layers(backbone, name).items():
        assert isinstance(layer, nn.Module)
        yield module, layer, base_layer(layer)


class LeadingPairs:
    """The PiSSA start of an adapter's pairs, subtracted from its layers until `remove`."""

    def __init__(self, backbone: Backbone, name: str):
        self._start: dict[str, LoraPair] = {}
        self._handles = []
        pairs = {pair.name: pair for pair in read_pairs(backbone, name)}
        for module, layer, base in _layers(backbone, name):
            pair = pairs[module]
            assert isinstance(base, nn.Linear | nn.Conv2d)
            set_product(pair, *leading(base.weight.detach().flatten(1), pair.rank))
            down, up = (each.detach().clone() for each in (pair.down, pair.up))
            self._start[module] = LoraPair(module, down, up, pair.scale)
            hook = _subtracting(base, down, up * pair.scale)
            self._handles.append(layer.register_forward_hook(hook))

    def whole(self, pair: LoraPair) -> LoraPair:
        """The update of a trained pair, scale (up down - up0 down0), as a pair of rank 2r."""
        start = self._start[pair.name]
        down = torch.cat([pair.down.detach(), start.down])
        return LoraPair(pair.name, down, torch.cat([pair.up.detach(), -start.up], 1), pair.scale)

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()


def _subtracting(base: nn.Linear | nn.Conv2d, down: Tensor, up: Tensor) -> Callable:
    def hook(module: nn.Module, arguments: tuple, output: Tensor) -> Tensor:
        inputs = arguments[0].to(down.dtype)
        if isinstance(base, nn.Linear):
            product = F.linear(F.linear(inputs, down), up)
        else:
            product = F.conv2d(base._conv_forward(inputs, down, None), up)
        return output - product.to(output.dtype)

    return hook


def follow_gradient(
    backbone: Backbone, name: str, backward: Callable[[], object], size: float
) -> None:
    """Start an adapter's pairs, whose `up` is zero, along a loss's gradient by the base's weights.

    `backward` computes the loss, or several, and calls their `backward`. `size` is the spectral
    norm of every layer's update. Layers without a gradient stay as they are; OptimizerError where
    no layer has one.
    """
    with _weight_gradients(backbone, name) as gradients:
        backward()
    if not any(gradient.any() for gradient in gradients.values()):
        raise OptimizerError("no gradient reaches the layers of the pairs: nothing to start from")
    for pair in read_pairs(backbone, name):
        pair.up.grad = pair.down.grad = None
        gradient = gradients.get(pair.name)
        if gradient is not None and gradient.any():
            left, values, right = leading(gradient.to(pair.up.device), pair.rank)
            set_product(pair, -left, size * values / values[0], right)


@contextmanager
def _weight_gradients(backbone: Backbone, name: str) -> Iterator[dict[str, Tensor]]:
    """Sums of gradients (out, in * k * k) by the weights of an adapter's layers, by module name.

    They are computed from the layers' inputs and the gradients by their outputs, so the weights
    need not be trainable, nor stored in full. The sums lie in main memory.
    """
    sums: dict[str, Tensor] = {}
    handles = [
        # prepended, as a method's own hook may hold a part of the output
        layer.register_forward_hook(_summing(base, module, sums), prepend=True)
        for module, layer, base in _layers(backbone, name)
    ]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()


def _summing(base: nn.Module, module: str, sums: dict[str, Tensor]) -> Callable:
    def hook(layer: nn.Module, arguments: tuple, output: Tensor) -> None:
        inputs = arguments[0].detach()

        def add(gradient: Tensor) -> None:
            found = weight_gradient(base, inputs.float(), gradient.float()).cpu()
            sums[module] = sums[module] + found if module in sums else found

        if output.requires_grad:
            output.register_hook(add)

    return hook


@torch.no_grad()
def weight_gradient(base: nn.Module, inputs: Tensor, gradient: Tensor) -> Tensor:
    """The gradient (out, in * k * k) by a layer's weight, from that by its output."""
    if isinstance(base, nn.Conv2d):
        assert base.groups == 1 and not isinstance(base.padding, str)
        columns = F.unfold(inputs, base.kernel_size, base.dilation, base.padding, base.stride)
        return torch.einsum("bol,bil->oi", gradient.flatten(2), columns)
    return gradient.flatten(0, -2).mT @ inputs.flatten(0, -2)
