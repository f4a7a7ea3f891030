"""Muon for the denoisers' matrices and convolutions (Jordan et al. 2024).

At equal time on one thread it learns more than AdamW: after four minutes the UNet's error in clean
latents was 0.186 (12,160 pictures) against 0.194 (15,296).
"""

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic Newton-Schulz iteration
MOMENTUM = 0.95


def orthogonalised(matrix: Tensor, steps: int = 5) -> Tensor:
    """A matrix with the same singular vectors and singular values near 1; (m, n) to (m, n).

    The steps act on the small Gram matrix, which is formed anew after half of them: rounding would
    otherwise leave it with negative eigenvalues, which the iteration multiplies by 12 each.
    """
    a, b, c = COEFFICIENTS
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = wide.bfloat16()
    x = x / (x.norm() + 1e-7)
    one = torch.eye(len(x), device=x.device)
    for count in (steps // 2, steps - steps // 2):
        gram, product = (x @ x.T).float(), one
        for _ in range(count):
            factor = a * one + b * gram + c * gram @ gram
            product, gram = factor @ product, factor @ gram @ factor
        x = product.bfloat16() @ x
    return (x if wide is matrix else x.T).to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum whose update is orthogonalised; weights are flattened to (out, rest)."""

    def __init__(self, parameters: list[nn.Parameter], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every weight that has a gradient."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["momentum"] = torch.zeros_like(weight)
                momentum = state["momentum"].lerp_(weight.grad, 1 - MOMENTUM)
                update = weight.grad.lerp(momentum, MOMENTUM).flatten(1)
                tall = max(1.0, update.shape[0] / update.shape[1]) ** 0.5
                direction = orthogonalised(update).view_as(weight)
                weight.add_(direction, alpha=-group["lr"] * tall)


def split_weights(network: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Weights for Muon (inner matrices and convolutions), and all others, for AdamW."""
    ends = ("conv_in", "conv_out", "all_x_embedder", "all_final_layer", "cap_embedder")
    inner, others = [], []
    for name, weight in network.named_parameters():
        (inner if weight.ndim >= 2 and not name.startswith(ends) else others).append(weight)
    return inner, others
