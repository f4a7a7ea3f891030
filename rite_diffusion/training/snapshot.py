"""Snapshots to resume from: trained weights, their averages, and the optimizer's state.

Order, noise, timesteps and rates are functions of seed and step, and need no saving.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from rite_diffusion.errors import RunError
from rite_diffusion.training.average import WeightAverage
from rite_diffusion.training.precision import MixedPrecision


@dataclass(frozen=True)
class Snapshot:
    """The state after `step` steps.

    Keys are `weights/<name>`, `average/<name>`, `optimizer/<name>/<key>` and, in fp16,
    `precision/<key>`.
    """

    step: int
    tensors: dict[str, Tensor]


def _named_state(optimizer: Optimizer) -> list[tuple[str, int, Tensor]]:
    """(name, index in the optimizer's state, parameter) of every parameter."""
    indices = [i for group in optimizer.state_dict()["param_groups"] for i in group["params"]]
    named = [
        (name, parameter)
        for group in optimizer.param_groups
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
    ]
    return [(name, i, parameter) for i, (name, parameter) in zip(indices, named, strict=True)]


def packed(tensor: Tensor) -> Tensor:
    """A contiguous copy in main memory, without gradient."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def take_snapshot(
    step: int, optimizer: Optimizer, average: WeightAverage, precision: MixedPrecision
) -> Snapshot:
    """A copy of parameters, optimizer state, averages and loss scale after `step` steps."""
    state = optimizer.state_dict()["state"]
    tensors = {f"average/{name}": packed(value) for name, value in average.state().items()}
    tensors |= {f"precision/{name}": value for name, value in precision.state().items()}
    for name, index, parameter in _named_state(optimizer):
        tensors[f"weights/{name}"] = packed(parameter)
        for key, value in state.get(index, {}).items():
            if value is not None:
                tensors[f"optimizer/{name}/{key}"] = packed(value)
    return Snapshot(step, tensors)


@torch.no_grad()
def restore_snapshot(
    snapshot: Snapshot, optimizer: Optimizer, average: WeightAverage, precision: MixedPrecision
) -> None:
    """Load a snapshot into optimizer, averages and loss scale; RunError where it does not fit."""
    named = _named_state(optimizer)
    wanted = {f"weights/{name}": tuple(parameter.shape) for name, _, parameter in named}
    found = {k: tuple(v.shape) for k, v in snapshot.tensors.items() if k.startswith("weights/")}
    if wanted != found:
        odd = sorted(set(wanted.items()) ^ set(found.items()))[0][0].removeprefix("weights/")
        raise RunError(
            f"the checkpoint holds {len(found)} weights, this run trains {len(wanted)}; first "
            f"difference: {odd}. Choose another --out to start afresh."
        )
    state: dict[int, dict[str, Tensor]] = {}
    for name, index, parameter in named:
        parameter.copy_(snapshot.tensors[f"weights/{name}"])
        if own := _part(snapshot, f"optimizer/{name}/"):
            state[index] = own
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    average.load(_part(snapshot, "average/"))
    precision.load(_part(snapshot, "precision/"))


def _part(snapshot: Snapshot, prefix: str) -> dict[str, Tensor]:
    """The tensors whose keys start with a prefix, without it."""
    named = snapshot.tensors.items()
    return {key.removeprefix(prefix): value for key, value in named if key.startswith(prefix)}
