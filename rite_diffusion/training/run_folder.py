"""The run folder: the one registry that the CLI, a studio and a crashed machine share.

config.toml  status.json  metrics.jsonl  log.txt  lock
previews/step-000100-0.png  checkpoints/step-000100/adapter.safetensors  adapter.safetensors
"""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

from rite_diffusion.adapters.file import Adapter, save_adapter, write_atomically
from rite_diffusion.types import RunError


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


class RunFolder:
    """A run folder held under its lock; use as a context manager.

    Raises RunError where the folder cannot be written, holds a finished run, or is in use.
    """

    def __init__(self, path: Path):
        self.path = path
        self.adapter_path = path / "adapter.safetensors"

    def __enter__(self) -> "RunFolder":
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._refuse_finished()
            self._lock()
            for name in ("previews", "checkpoints"):
                (self.path / name).mkdir(exist_ok=True)
        except OSError as error:
            reason = error.strerror or str(error)
            raise RunError(
                f"cannot write to {self.path}: {reason}. Choose another --out."
            ) from None
        return self

    def __exit__(self, *_: object) -> None:
        (self.path / "lock").unlink(missing_ok=True)

    def _refuse_finished(self) -> None:
        if self.adapter_path.exists():
            raise RunError(
                f"{self.path} already holds an adapter. Choose another --out, or delete the folder."
            )

    def _lock(self) -> None:
        lock = self.path / "lock"
        try:
            descriptor = os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            owner = lock.read_text(encoding="utf-8").strip()
            if owner.isdigit() and _alive(int(owner)):
                raise RunError(f"{self.path} is in use by process {owner}.") from None
            lock.unlink()
            return self._lock()
        with os.fdopen(descriptor, "w") as stream:
            stream.write(str(os.getpid()))

    def write_config(self, text: str) -> None:
        """Keep the resolved configuration."""
        write_atomically(self.path / "config.toml", text.encode())

    def write_status(self, state: str, step: int, total: int) -> None:
        """Tell whoever looks how far the run is."""
        status = {
            "state": state,
            "step": step,
            "total": total,
            "pid": os.getpid(),
            "time": round(time.time(), 3),
        }
        write_atomically(self.path / "status.json", json.dumps(status).encode())

    def write_metrics(self, **figures: Any) -> None:
        """Append a line of figures."""
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(figures) + "\n")

    def log(self, line: str) -> None:
        """Append a line to the log."""
        with (self.path / "log.txt").open("a", encoding="utf-8") as stream:
            stream.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")

    def save_checkpoint(self, adapter: Adapter, step: int, keep: int) -> Path:
        """Write the adapter at a step and drop checkpoints beyond the newest `keep`."""
        final = self.path / "checkpoints" / f"step-{step:06d}"
        partial = final.with_name(final.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        save_adapter(partial / "adapter.safetensors", adapter)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for old in self.checkpoints()[:-keep]:
            shutil.rmtree(old)
        return final

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        folders = (self.path / "checkpoints").glob("step-*")
        return sorted(folder for folder in folders if folder.suffix != ".partial")
