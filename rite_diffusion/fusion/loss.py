"""The loss of limiting updates to a rank: the relative Frobenius error over all layers."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from rite_diffusion.adapters import Adapter
from rite_diffusion.errors import AdapterError
from rite_diffusion.fusion.layer import Factors, as_pair, flat, stack
from rite_diffusion.fusion.low_rank import squared_norm, to_rank
from rite_diffusion.types import LoraPair

ALLOWED = 0.01  # largest loss without --allow-loss
LARGEST_RANK = 4096


@dataclass
class Loss:
    """Sums over layers: `lost` of |cut - whole|^2, `size` of |whole|^2."""

    lost: float = 0.0
    size: float = 0.0

    def add(self, whole: Factors, cut: Factors) -> None:
        """Add a layer: its whole update, and the same limited to a rank."""
        self.size += squared_norm(whole)
        if cut is not whole:
            difference = stack([cut, Factors(-whole.up, whole.down)])
            self.lost += max(squared_norm(difference), 0.0)

    def relative(self) -> float:
        """The relative error of all updates together; 0 where nothing was cut."""
        return (self.lost / self.size) ** 0.5 if self.lost and self.size else 0.0


def describe_loss(loss: float) -> str:
    """The loss as text for messages."""
    return f"relative error {loss:.2g} of all layers' updates"


def cut_adapter(adapter: Adapter, rank: int) -> tuple[Adapter, float]:
    """The adapter with updates limited to `rank`, each to the nearest such update, and the loss.

    AdapterError for a rank outside 1 to 4096, and for DoRA layers that would be cut: their norms
    are valid for their own factors only.
    """
    if not 1 <= rank <= LARGEST_RANK:
        raise AdapterError(f"rank {rank} is not between 1 and {LARGEST_RANK}")
    _refuse_doras([pair for pair in adapter.pairs if pair.rank > rank])
    loss, pairs = Loss(), list[LoraPair]()
    for pair in adapter.pairs:
        whole = flat(replace(pair, magnitude=None), 1.0)
        cut = to_rank(whole, rank)
        loss.add(whole, cut)
        pairs.append(pair if cut is whole else as_pair(pair.name, cut, pair.down.shape[1:]))
    return replace(adapter, pairs=pairs), loss.relative()


def _refuse_doras(pairs: Sequence[LoraPair]) -> None:
    norms = [pair.name for pair in pairs if pair.magnitude is not None]
    if norms:
        raise AdapterError(
            f"{len(norms)} layers to cut are DoRA (first: {norms[0]}), whose norms are valid for "
            "their own factors only: `rite fuse FILE --rank N` makes a LoRA of them first"
        )
