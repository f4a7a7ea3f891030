"""Cross-attention maps: how strongly each cell of the latents attends to a token."""

from collections import defaultdict
from collections.abc import Sequence

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn import functional as F


def attention_map(query: Tensor, key: Tensor, positions: Tensor, scale: float) -> Tensor:
    """Attention (B, cells, n) of each cell to n tokens of its prompt, averaged over heads.

    softmax(scale q k^T) of queries (B, heads, cells, d) and keys (B, heads, tokens, d), at
    `positions` (B, n).
    """
    shares = F.softmax(scale * query.float() @ key.float().mT, dim=-1)  # (B, heads, cells, tokens)
    places = positions[:, None, None, :].expand(*shares.shape[:3], -1)
    return shares.gather(-1, places).mean(1)


def grid_of(cells: int, height: int, width: int) -> tuple[int, int]:
    """Height and width of an attention map: the latents' sides, halved until they give `cells`.

    Halves are rounded up. ValueError where no such map has that number of cells.
    """
    while height * width > cells:
        height, width = -(-height // 2), -(-width // 2)
    if height * width != cells:
        raise ValueError(f"no attention map of these latents has {cells} cells")
    return height, width


class AttentionRecorder:
    """Records the queries and keys of the last pass through cross-attentions, with their graph.

    The model's own computation is unchanged. `maps` computes attention from the recorded tensors,
    for the samples and tokens that it is given.
    """

    def __init__(self, attentions: Sequence[nn.Module]):
        self._attentions: list[Attention] = []
        self._queries: dict[int, Tensor] = {}
        self._keys: dict[int, Tensor] = {}
        self._handles = []
        for number, module in enumerate(attentions):
            assert isinstance(module, Attention)
            self._attentions.append(module)
            for layer, kept in ((module.to_q, self._queries), (module.to_k, self._keys)):
                assert layer is not None
                self._handles.append(layer.register_forward_hook(_keeping(kept, number)))

    def maps(
        self, samples: list[int], positions: list[list[int]], height: int, width: int
    ) -> list[Tensor]:
        """A map (samples, n, h, w) for each resolution, averaged over its layers and heads.

        `positions` lists n tokens for each sample; height and width are the latents'.
        """
        sums: dict[int, Tensor] = {}
        heads: dict[int, int] = defaultdict(int)
        for number, module in enumerate(self._attentions):
            query, key = (
                kept[number][samples].unflatten(-1, (module.heads, -1)).transpose(1, 2)
                for kept in (self._queries, self._keys)
            )
            places = torch.tensor(positions, device=query.device)
            own = attention_map(query, key, places, module.scale) * module.heads
            cells = own.shape[1]
            sums[cells] = sums[cells] + own if cells in sums else own
            heads[cells] += module.heads
        return [
            (total / heads[cells]).mT.unflatten(-1, grid_of(cells, height, width))
            for cells, total in sums.items()
        ]

    def clear(self) -> None:
        """Drop the recorded tensors."""
        self._queries.clear()
        self._keys.clear()

    def remove(self) -> None:
        """Remove the hooks from the model and drop the recorded tensors."""
        self.clear()
        for handle in self._handles:
            handle.remove()


def _keeping(kept: dict[int, Tensor], number: int):
    def hook(module: nn.Module, arguments: tuple, output: Tensor) -> None:
        kept[number] = output

    return hook
