"""Milliseconds per optimizer step at the LoRA shapes of Stable Diffusion 1.5 and SDXL.

Every optimizer steps on its own copy of the same factors and gradients, in turn within one process,
so that a busy machine slows all alike. `python benchmarks/optimizer_step.py` writes
results/optimizer_step.json; the peers come from the `dev` extra.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from machine import write_result
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from rite_diffusion.optim import LoraRite, ScaledAdamW, ScaledSGD, lora_param_groups


def sd15() -> list[tuple[int, int]]:
    """(out, in) of the attention projections of SD1.5's UNet (128) and text encoder (48)."""
    shapes = []
    for width, blocks in ((320, 5), (640, 5), (1280, 6)):
        shapes += blocks * ([(width, width)] * 6 + [(width, 768)] * 2)
    return shapes + [(768, 768)] * 48


def sdxl() -> list[tuple[int, int]]:
    """(out, in) of the attention projections of SDXL's UNet (560); its text encoders rest."""
    shapes = []
    for width, blocks in ((640, 10), (1280, 60)):
        shapes += blocks * ([(width, width)] * 6 + [(width, 2048)] * 2)
    return shapes


MODELS = {"sd15": sd15, "sdxl": sdxl}


class Layer(nn.Module):
    """A LoRA layer's factors, named as PEFT names them."""

    def __init__(self, rows: int, columns: int, rank: int):
        super().__init__()
        down, up = torch.randn(rank, columns) / rank, torch.randn(rows, rank) * 0.01
        self.lora_A = nn.ParameterDict({"default": nn.Parameter(down)})
        self.lora_B = nn.ParameterDict({"default": nn.Parameter(up)})


def factors(shapes: list[tuple[int, int]], rank: int) -> nn.ModuleList:
    """Layers with gradients."""
    torch.manual_seed(0)
    model = nn.ModuleList([Layer(*shape, rank) for shape in shapes])
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) * 1e-4
    return model


def peft_riemannian(model: nn.Module) -> torch.optim.Optimizer:
    """PEFT's Riemannian-preconditioned AdamW."""
    from peft.optimizers import create_riemannian_optimizer

    return create_riemannian_optimizer(model, torch.optim.AdamW, lr=1e-4)  # type: ignore[arg-type]


def peft_riemannian_sgd(model: nn.Module) -> torch.optim.Optimizer:
    """PEFT's Riemannian-preconditioned SGD."""
    from peft.optimizers import create_riemannian_optimizer

    return create_riemannian_optimizer(model, torch.optim.SGD, lr=1e-4)  # type: ignore[arg-type]


def pytorch_optimizer_rite(model: nn.Module) -> torch.optim.Optimizer:
    """pytorch_optimizer's LoRARite."""
    from pytorch_optimizer import LoRARite

    return LoRARite(list(model.parameters()), lr=1e-4)


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "adamw foreach": lambda m: torch.optim.AdamW(m.parameters(), 1e-4, foreach=True),
    "adamw fused": lambda m: torch.optim.AdamW(m.parameters(), 1e-4, fused=True),
    "scaled_sgd": lambda m: ScaledSGD(lora_param_groups(m), lr=1e-4),
    "scaled_adamw": lambda m: ScaledAdamW(lora_param_groups(m), lr=1e-4),
    "rite": lambda m: LoraRite(lora_param_groups(m), lr=1e-4),
    "peft riemannian sgd": peft_riemannian_sgd,
    "peft riemannian adamw": peft_riemannian,
    "pytorch_optimizer rite": pytorch_optimizer_rite,
}


class CountOperations(TorchDispatchMode):
    """Counts the operations that torch runs."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # noqa: D105
        self.count += 1
        return function(*args, **(kwargs or {}))


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all state tensors."""
    states = optimizer.state_dict()["state"].values()
    tensors = [v for state in states for v in state.values() if isinstance(v, Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def measure(shapes: list[tuple[int, int]], rank: int, rounds: int) -> dict[str, dict[str, float]]:
    """Median milliseconds, operations and state of every optimizer, measured in turn."""
    models = {name: factors(shapes, rank) for name in OPTIMIZERS}
    optimizers = {name: make(models[name]) for name, make in OPTIMIZERS.items()}
    gradients = {n: [p.grad.clone() for p in m.parameters()] for n, m in models.items()}
    times: dict[str, list[float]] = {name: [] for name in optimizers}
    for turn in range(rounds + 2):
        for name, optimizer in optimizers.items():
            torch._foreach_copy_([p.grad for p in models[name].parameters()], gradients[name])
            start = time.perf_counter()
            optimizer.step()
            if turn >= 2:
                times[name].append((time.perf_counter() - start) * 1e3)
    figures = {}
    for name, optimizer in optimizers.items():
        with CountOperations() as counter:
            optimizer.step()
        figures[name] = {
            "ms": round(statistics.median(times[name]), 2),
            "ratio": 0.0,
            "operations": counter.count,
            "state_mib": round(state_bytes(optimizer) / 2**20, 2),
        }
    for row in figures.values():
        row["ratio"] = round(row["ms"] / figures["adamw foreach"]["ms"], 2)
    return figures


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--ranks", nargs="+", type=int, default=[4, 16, 64, 128])
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    results: dict[str, dict] = {}
    for model in options.models:
        for rank in options.ranks:
            rows = measure(MODELS[model](), rank, options.rounds)
            results[f"{model}, rank {rank}"] = rows
            print(f"{model}, rank {rank}")
            for name, row in rows.items():
                print(f"  {name:24}" + "".join(f" {key} {value:<9}" for key, value in row.items()))
    write_result("optimizer_step", {"unit": "ms per step, median", "results": results})


if __name__ == "__main__":
    main()
