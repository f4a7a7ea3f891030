"""The device a base is trained on, and the state that lets a training go on where it stopped."""

import contextlib
import json
import math
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

STATES = Path(__file__).parent / "states"  # weights of trainings that are not over
SAVE_SECONDS = 300  # between two states on disk


@dataclass(frozen=True)
class Machine:
    """Where tensors live, whether bf16 is quick there, and how many processes draw pictures."""

    device: torch.device
    uses_bf16: bool
    workers: int

    def autocast(self) -> contextlib.AbstractContextManager:
        """bf16 where the device has units for it; float32 elsewhere."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.uses_bf16)


def this_machine() -> Machine:
    """The first GPU, or the CPU with as many threads as OMP_NUM_THREADS says.

    Without AMX, bf16 convolutions on a CPU take 1.6 times as long as float32 ones.
    """
    if torch.cuda.is_available():
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        return Machine(torch.device("cuda"), True, max(1, (os.cpu_count() or 2) - 1))
    return Machine(torch.device("cpu"), "amx_tile" in _cpu_flags(), 0)


def _cpu_flags() -> str:
    info = Path("/proc/cpuinfo")
    return info.read_text() if info.exists() else ""


def save_state(
    path: Path,
    seen: int,
    optimizers: dict[str, torch.optim.Optimizer],
    modules: dict[str, nn.Module],
) -> None:
    """Write modules, the optimizers' moments and the number of pictures seen, atomically."""
    tensors = {f"{name}/{k}": v for name, m in modules.items() for k, v in m.state_dict().items()}
    for name, optimizer in optimizers.items():
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{name}/{index}/{key}": value for key, value in state.items()}
    tensors = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary, {"seen": json.dumps(seen)})
    temporary.replace(path)


def keep_weights(path: Path) -> Path:
    """Write the weights of a state, averaged ones where it has them, into STATES in fp16."""
    tensors = load_file(path)
    kept = {name: each.half() for name, each in tensors.items() if name.startswith("average/")}
    if not kept:
        left_out = ("optimizer/", "critic/")
        kept = {n: each.half() for n, each in tensors.items() if not n.startswith(left_out)}
    STATES.mkdir(exist_ok=True)
    save_file(kept, STATES / path.name, {"seen": json.dumps(seen_in(path))})
    return STATES / path.name


def take_kept(work: Path) -> None:
    """Copy the weights in STATES into a work folder, where it has no state of that name."""
    for path in sorted(STATES.glob("*.safetensors")):
        if not (work / path.name).exists():
            shutil.copy(path, work)


def load_state(
    path: Path, optimizers: dict[str, torch.optim.Optimizer], modules: dict[str, nn.Module]
) -> int:
    """Restore what `save_state` wrote; the number of pictures seen, 0 where there is no state.

    From what `keep_weights` wrote the networks go on, and the optimizers' moments and the critic
    begin anew.
    """
    if not path.exists():
        return 0
    tensors = load_file(path)
    for name, module in modules.items():
        own = _part(tensors, f"{name}/")
        if not own and name != "critic":
            own = _part(tensors, "average/")
        if own:
            module.load_state_dict(own)
    for name, optimizer in optimizers.items():
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in _part(tensors, f"optimizer/{name}/").items():
            index, field = key.split("/")
            state.setdefault(int(index), {})[field] = value
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    return seen_in(path)


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def seen_in(path: Path) -> int:
    """How many pictures the training whose state lies at `path` has seen; 0 without a state."""
    if not path.exists():
        return 0
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return int(header["__metadata__"]["seen"])


def rate_at(peak: float, seen: int, total: int, warm_up: int = 3000, flat: float = 0.5) -> float:
    """Learning rate: a warm-up, constant to the share `flat` of the total, a cosine to zero."""
    falling = min(1.0, max(0.0, (seen / total - flat) / (1 - flat)))
    return peak * min(1.0, (seen + 1) / warm_up) * (0.5 + 0.5 * math.cos(math.pi * falling))


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = rate


@torch.no_grad()
def update_average(average: nn.Module, module: nn.Module, step: int, decay: float) -> None:
    """Move an exponential moving average of weights on; its decay grows over the first steps."""
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.parameters()), list(module.parameters()), 1 - decay)


class Progress:
    """Prints lines of progress, and says when a state is due."""

    def __init__(self, stage: str, seen: int, total: int) -> None:
        self.stage, self.first, self.total = stage, seen, total
        self.start = self.last = time.time()

    def is_due(self, seen: int) -> bool:
        """Whether the last state is old enough for another, or the training is over."""
        due = seen >= self.total or time.time() - self.last > SAVE_SECONDS
        if due:
            self.last = time.time()
        return due

    def report(self, seen: int, figures: dict[str, float]) -> None:
        """Print one line: what was seen, the figures, the speed and the time that is left."""
        rate = (seen - self.first) / max(time.time() - self.start, 1e-9)
        numbers = " ".join(f"{name} {value:.4f}" for name, value in figures.items())
        left = (self.total - seen) / max(rate, 1e-9) / 60
        clock = time.strftime("%H:%M")
        line = (
            f"{clock} {self.stage} {seen}/{self.total} {numbers} {rate:.1f}/s {left:.0f} min left"
        )
        print(line, flush=True)
