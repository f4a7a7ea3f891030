"""What a result was measured on, and where it is kept."""

import json
import os
import platform
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def describe() -> dict[str, Any]:
    """Processor, cores, and versions."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].split(":", 1)[1].strip() if names else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def memory_mib(pid: int | str, key: str) -> float:
    """MiB that a process holds (VmRSS) or has held at most so far (VmHWM); 0 once it has ended.

    Unlike getrusage's peak, these do not begin with what the parent held when it forked.
    """
    found = re.search(rf"{key}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) / 1024 if found else 0.0


def readable_command(arguments: list[str]) -> str:
    """The command that a reader types at the root of the repository, without this machine's paths.

    A path inside the repository is given from its root, of any other the name stays.
    """
    script, *options = arguments
    return shlex.join(["python", _readable(str(Path(script).resolve())), *map(_readable, options)])


def _readable(argument: str) -> str:
    option, sign, value = argument.rpartition("=")
    path = Path(value).expanduser()
    if not path.is_absolute():
        return argument
    inside = path.is_relative_to(ROOT)
    return f"{option}{sign}{path.relative_to(ROOT) if inside else path.name}"


def write_result(name: str, figures: dict[str, Any]) -> Path:
    """Write figures with machine and command to results/<name>.json."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    content = {"command": readable_command(sys.argv), "machine": describe(), **figures}
    path.write_text(json.dumps(content, indent=2) + "\n")
    return path
