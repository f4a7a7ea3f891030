"""Milliseconds per optimizer step at the LoRA shapes of Stable Diffusion 1.5 and SDXL.

Every optimizer steps on its own copy of the same factors and gradients, in turn within one process,
so that a busy machine slows all alike: first those with a Riemannian metric, then
LoRA-RITE and LoRA-Muon, each beside torch's AdamW. `python benchmarks/optimizer_step.py` writes
results/optimizer_step.json, and with `--models` or `--ranks` renews a part of it; the peers come
from the `dev` extra.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from machine import RESULTS, write_result
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from rite_diffusion.files.writing import read_json
from rite_diffusion.optim import (
    LoraMuon,
    LoraRite,
    ScaledAdamW,
    ScaledSGD,
    lora_param_groups,
)


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
    "lora_muon": lambda m: LoraMuon(lora_param_groups(m), lr=1e-2),
    "peft riemannian sgd": peft_riemannian_sgd,
    "peft riemannian adamw": peft_riemannian,
    "pytorch_optimizer rite": pytorch_optimizer_rite,
}


BASE = "adamw foreach"  # what the ratios are to
FAMILIES = [  # measured side by side
    [BASE, "adamw fused", "scaled_sgd", "scaled_adamw", "peft riemannian sgd",
     "peft riemannian adamw"],
    [BASE, "rite", "lora_muon", "pytorch_optimizer rite"],
]  # fmt: skip


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


def measure(
    shapes: list[tuple[int, int]], rank: int, rounds: int, names: list[str]
) -> dict[str, dict[str, float]]:
    """Median milliseconds, operations and state of some optimizers, measured in turn."""
    models = {name: factors(shapes, rank) for name in names}
    optimizers = {name: OPTIMIZERS[name](models[name]) for name in names}
    gradients = [p.grad.clone() for p in models[BASE].parameters()]
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 2):
        for name, optimizer in optimizers.items():
            torch._foreach_copy_([p.grad for p in models[name].parameters()], gradients)
            start = time.perf_counter()
            optimizer.step()
            if turn >= 2:
                times[name].append((time.perf_counter() - start) * 1e3)
    base = statistics.median(times[BASE])
    figures = {}
    for name, optimizer in optimizers.items():
        with CountOperations() as counter:
            optimizer.step()
        middle = statistics.median(times[name])
        figures[name] = {
            "ms": round(middle, 2),
            "ratio": round(middle / base, 2),
            "operations": counter.count,
            "state_mib": round(state_bytes(optimizer) / 2**20, 2),
        }
    return figures


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--ranks", nargs="+", type=int, default=[4, 16, 64, 128])
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    path = RESULTS / "optimizer_step.json"
    results: dict[str, dict] = read_json(path)["results"] if path.exists() else {}
    for model in options.models:
        for rank in options.ranks:
            rows: dict[str, dict[str, float]] = {}
            for family in FAMILIES:
                found = measure(MODELS[model](), rank, options.rounds, family)
                rows |= {name: row for name, row in found.items() if name not in rows}
            command = f"python optimizer_step.py --models {model} --ranks {rank}"
            command += f" --rounds {options.rounds}"
            results[f"{model}, rank {rank}"] = {"command": command, "optimizers": rows}
            print(f"{model}, rank {rank}")
            for name, row in rows.items():
                print(f"  {name:24}" + "".join(f" {key} {value:<9}" for key, value in row.items()))
            write_result("optimizer_step", {"unit": "ms per step, median", "results": results})


if __name__ == "__main__":
    main()
