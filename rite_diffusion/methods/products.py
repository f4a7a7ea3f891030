"""LoHa and LoKr (Yeh et al. 2024, arXiv 2309.14859): updates by products of small matrices.

    LoHa:  delta W = scale (w1_a w1_b) * (w2_a w2_b), elementwise: rank up to r^2
    LoKr:  delta W = scale w1 (x) w2, a Kronecker product; w2 = w2_a w2_b or whole

They are added to the layers' outputs by hooks, so the base's weights may be stored in any way.
Names and starts are LyCORIS's: the second matrix is zero.
"""

from collections.abc import Callable, Sequence
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from rite_diffusion.adapters.attach import base_layer, weight_shape
from rite_diffusion.adapters.names import module_name
from rite_diffusion.backbones.protocols import Backbone
from rite_diffusion.config import LoraSection
from rite_diffusion.types import LoraPair, ProductUpdate


class Product(nn.Module):
    """The update of a layer's weight (out, in, *kernel) by named matrices."""

    scale: float
    is_whole = False  # whether no matrix is a product of factors

    def forward(self, base: nn.Module, inputs: Tensor) -> Tensor:
        """The update's output for the base layer's inputs, without bias."""
        raise NotImplementedError

    def matrix(self, name: str, rows: int, columns: int) -> nn.Parameter:
        """A new parameter (rows, columns), not yet set."""
        parameter = nn.Parameter(torch.empty(rows, columns))
        self.register_parameter(name, parameter)
        return parameter


class Loha(Product):
    """A Hadamard product of two products of a rank."""

    def __init__(self, shape: Sequence[int], rank: int, alpha: float | None):
        super().__init__()
        self.shape, self.scale = tuple(shape), 1.0 if alpha is None else alpha / rank
        outputs, inputs = shape[0], prod(shape[1:])
        self.hada_w1_a = nn.init.normal_(self.matrix("hada_w1_a", outputs, rank), std=0.1)
        self.hada_w1_b = nn.init.normal_(self.matrix("hada_w1_b", rank, inputs))
        self.hada_w2_a = nn.init.zeros_(self.matrix("hada_w2_a", outputs, rank))
        self.hada_w2_b = nn.init.normal_(self.matrix("hada_w2_b", rank, inputs))

    def forward(self, base: nn.Module, inputs: Tensor) -> Tensor:
        """The dense update's output; it is computed again in the backward pass, to save memory."""
        return checkpoint(  # pyright: ignore[reportReturnType]
            self._output, base, inputs, *self.parameters(), use_reentrant=False,
            preserve_rng_state=False,
        )  # fmt: skip

    def _output(self, base: nn.Module, inputs: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor):
        weight = self.scale * ((a @ b) * (c @ d))
        return apply(base, inputs, weight.reshape(self.shape))


class Lokr(Product):
    """A Kronecker product; `rank` of the second matrix is None where that is whole.

    `factor` bounds the size of the first matrix, whose sides divide the weight's.
    """

    def __init__(self, shape: Sequence[int], rank: int | None, alpha: float | None, factor: int):
        super().__init__()
        (rows, outputs), (columns, inputs) = (divided(side, factor) for side in shape[:2])
        self.lokr_w1 = nn.init.kaiming_uniform_(self.matrix("lokr_w1", rows, columns), a=5**0.5)
        self.shape = (outputs, inputs, *shape[2:])  # of the second matrix
        if rank is not None and rank >= max(outputs, inputs) / 2:
            rank = None
        self.is_whole = rank is None
        self.scale = 1.0 if rank is None or alpha is None else alpha / rank
        if rank is None:
            self.lokr_w2 = nn.Parameter(torch.zeros(self.shape))
        else:
            columns = prod(self.shape[1:])
            self.lokr_w2_a = nn.init.kaiming_uniform_(
                self.matrix("lokr_w2_a", outputs, rank), a=5**0.5
            )
            self.lokr_w2_b = nn.init.zeros_(self.matrix("lokr_w2_b", rank, columns))

    def forward(self, base: nn.Module, inputs: Tensor) -> Tensor:
        """(w1 (x) w2) x, as w2 on every part of the channels and w1 across the parts."""
        columns = self.lokr_w1.shape[1]
        if self.is_whole:
            second = self.lokr_w2
        else:
            second = (self.lokr_w2_a @ self.lokr_w2_b).reshape(self.shape)
        channels = -1 if isinstance(base, nn.Linear) else 1
        parts = inputs.unflatten(channels, (columns, -1))
        first = self.scale * self.lokr_w1
        if isinstance(base, nn.Linear):
            return (first @ F.linear(parts, second)).flatten(-2)
        found = apply(base, parts.flatten(0, 1), second).unflatten(0, (-1, columns))
        return torch.einsum("mk,bkohw->bmohw", first, found).flatten(1, 2)


def new_product(lora: LoraSection, shape: Sequence[int]) -> Product:
    """The product of `lora.kind`, loha or lokr, for a weight of that shape."""
    if lora.kind == "loha":
        return Loha(shape, lora.rank, lora.alpha)
    return Lokr(shape, None if lora.full_matrix else lora.rank, lora.alpha, lora.factor)


def divided(side: int, factor: int) -> tuple[int, int]:
    """(m, n) with m n = side, where m is the largest divisor up to `factor` and √side."""
    first = next(m for m in range(min(factor, int(side**0.5)), 0, -1) if side % m == 0)
    return first, side // first


def apply(base: nn.Module, inputs: Tensor, weight: Tensor) -> Tensor:
    """A base layer's operation with another weight and without bias."""
    if isinstance(base, nn.Conv2d):
        return base._conv_forward(inputs, weight, None)
    return F.linear(inputs, weight)


def _adding(product: Product, base: nn.Module) -> Callable:
    def hook(module: nn.Module, arguments: tuple, output: Tensor) -> Tensor:
        return output + product(base, arguments[0].float()).to(output.dtype)

    return hook


class ProductWeights:
    """New LoHa or LoKr updates on layers by component, initialised by a seed.

    `make` gives the product for a weight's shape.
    """

    def __init__(
        self,
        backbone: Backbone,
        paths: dict[str, list[str]],
        make: Callable[[Sequence[int]], Product],
        seed: int = 0,
    ):
        self._products: dict[tuple[str, str], Product] = {}
        self._handles = []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for component, own in paths.items():
                for path in own:
                    layer = backbone.components[component].get_submodule(path)
                    base = base_layer(layer)
                    product = make(weight_shape(base)).to(backbone.device)
                    self._products[component, path] = product
                    self._handles.append(layer.register_forward_hook(_adding(product, base)))

    @property
    def named(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        """Component -> the matrices of its updates."""
        found: dict[str, list[tuple[str, nn.Parameter]]] = {}
        for (component, path), product in self._products.items():
            found.setdefault(component, []).extend(
                (f"{component}.{path}.{name}", each) for name, each in product.named_parameters()
            )
        return found

    def pairs(self) -> list[LoraPair]:
        """None: `products` has the updates."""
        return []

    def products(self) -> list[ProductUpdate]:
        """The updates; their tensors are those in training."""
        return [
            ProductUpdate(module_name(*layer), dict(product.named_parameters()), product.scale)
            for layer, product in self._products.items()
        ]

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
