"""Mix-of-Show's gradient fusion (Gu et al. 2023, arXiv 2305.18292), the reference for `gram`.

Per layer, L-BFGS on sum_i E_i|(D - D_i) x|^2 from D = 0 as in the authors' release: rate 1, history
25, strong Wolfe search, 500 iterations in the text encoder and for keys and values of the
cross-attentions, 50 elsewhere; the best update is returned. The release uses stored features, this
code roots of the second moments, with the same objective.
"""

import torch
from torch import Tensor

from rite_diffusion.fusion.layer import Factors, Layer, Part
from rite_diffusion.fusion.methods.gram import with_statistics
from rite_diffusion.fusion.settings import FusionSettings

LONG = ("attn2_to_k", "attn2_to_v")  # and the text encoder


def iterations(name: str) -> int:
    """L-BFGS iterations for a layer."""
    return 500 if name.startswith("lora_te") or name.endswith(LONG) else 50


def gradient(layer: Layer, settings: FusionSettings) -> Factors:
    """The best update of L-BFGS, of the sum of the ranks.

    Gradients, and so all steps, are in the span of the ups: its basis gives the exact factors.
    """
    parts = with_statistics(layer)
    basis, _ = torch.linalg.qr(torch.cat([part.factors.up for part in parts], 1))
    best = minimise(parts, iterations(layer.name))
    return Factors(basis, basis.mT @ best)


def minimise(parts: list[Part], steps: int) -> Tensor:
    """The dense update (out, inputs) with the least loss in `steps` iterations."""
    update = torch.zeros_like(parts[0].factors.dense(), requires_grad=True)
    wanted = [
        (part.factors.dense(), part.second_moment.spectral)
        for part in parts
        if part.second_moment is not None
    ]
    roots = [moment.root().mT for _, moment in wanted]
    optimizer = torch.optim.LBFGS(
        [update], lr=1, max_iter=steps, history_size=25, line_search_fn="strong_wolfe",
        tolerance_grad=1e-16, tolerance_change=1e-16,
    )  # fmt: skip
    best = (float("inf"), update.detach().clone())

    def closure() -> float:
        nonlocal best
        optimizer.zero_grad()
        loss = torch.zeros((), dtype=update.dtype)
        for (target, moment), root in zip(wanted, roots, strict=True):
            off = update - target
            loss = loss + (off @ root).square().sum() + moment.tail * off.square().sum()
        loss.backward()
        if loss.item() < best[0]:
            best = loss.item(), update.detach().clone()
        return loss.item()

    optimizer.step(closure)
    return best[1]
