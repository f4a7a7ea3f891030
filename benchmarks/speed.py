"""Seconds and peak memory of start-up, training and generation, each in a process of its own.

`python benchmarks/speed.py` writes results/speed.json: the median of several runs.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import memory_mib, write_result

from rite_diffusion.api.demo import example_photos

CLI = "from rite_diffusion.cli.app import main; main()"


def run(code: str, *arguments: str) -> tuple[float, float]:
    """Wall seconds and peak memory in MiB of one Python process."""
    start, peak = time.perf_counter(), 0.0
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.DEVNULL)
    while (status := process.poll()) is None:
        peak = max(peak, memory_mib(process.pid, "VmHWM"))
        time.sleep(0.01)
    if status:
        raise RuntimeError(f"{arguments} ended with status {status}")
    return time.perf_counter() - start, peak


def median_run(times: int, code: str, *arguments: str) -> dict[str, float]:
    """Median seconds and largest peak of several runs."""
    seconds, peaks = zip(*(run(code, *arguments) for _ in range(times)), strict=True)
    return {"seconds": round(statistics.median(seconds), 3), "peak_mib": round(max(peaks))}


def training(folder: Path) -> dict[str, float]:
    """A whole training run of the robot with the default preset, and its median step."""
    out = folder / "run"
    arguments = ["train", str(example_photos("robot")), "--trigger", "<robot>", "--class", "robot"]
    seconds, peak = run(CLI, *arguments, "--out", str(out))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    speeds = [line["images_per_second"] for line in lines[5:]]
    return {
        "seconds": round(seconds, 1),
        "peak_mib": round(peak),
        "steps": len(lines),
        "images_per_second": round(statistics.median(speeds), 1),
    }


def main() -> None:
    """Measure everything and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=5)
    times = parser.parse_args().times
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        figures = {
            "python_itself": median_run(times, "pass"),
            "import_rite_diffusion": median_run(times, "import rite_diffusion"),
            "rite_help": median_run(times, CLI, "--help"),
            "train": training(folder),
        }
        prompt = ["generate", "a <robot> on a blue background", "--out", str(folder / "out")]
        prompt += ["--adapter", str(folder / "run/adapter.safetensors")]
        figures["generate_1"] = median_run(times, CLI, *prompt)
        figures["generate_11"] = median_run(times, CLI, *prompt, "--num", "11")
        one, eleven = figures["generate_1"]["seconds"], figures["generate_11"]["seconds"]
        figures["seconds_per_picture"] = round((eleven - one) / 10, 3)
    print(json.dumps(figures, indent=2))
    write_result("speed", figures)


if __name__ == "__main__":
    main()
