"""The run folder: all files of a training, which the command and the studio read.

config.toml  inputs.json  status.json  metrics.jsonl  log.txt  lock  adapter.safetensors
previews/step-000100-0.png  checkpoints/step-000100/{adapter,training}.safetensors
requests/{save,sample}  empty files that ask the run for a checkpoint or previews
"""

import json
import os
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save

from rite_diffusion.adapters.file import Adapter, save_adapter
from rite_diffusion.errors import RunError
from rite_diffusion.files.writing import read_json, write_atomically
from rite_diffusion.training.lock import Lock
from rite_diffusion.training.snapshot import Snapshot

FILES = ("config.toml", "inputs.json", "status.json", "metrics.jsonl", "log.txt")


def _step_of(line: str) -> float:
    """The step of a line of metrics; infinite for a line that a crash has cut."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return float("inf")


def read_state(path: Path) -> str | None:
    """The state in a run folder's status file, None where there is none."""
    return read_json(path / "status.json").get("state")


class RunFolder:
    """A run folder; as a context manager it is created and locked.

    Raises RunError where the folder cannot be written or is in use.
    """

    def __init__(self, path: Path):
        self.path = path
        self.adapter_path = path / "adapter.safetensors"
        self._lock = Lock(path / "lock")

    def __enter__(self) -> "RunFolder":
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._refuse_foreign()
            self._take_lock()
            for name in ("previews", "checkpoints"):
                (self.path / name).mkdir(exist_ok=True)
        except OSError as error:
            self._lock.release()
            reason = error.strerror or str(error)
            raise RunError(
                f"cannot write to {self.path}: {reason}. Choose another --out."
            ) from None
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def is_finished(self) -> bool:
        """Whether the folder holds the adapter of a run that did all its steps."""
        going = ("preparing", "stopped", "running", "failed")
        return self.adapter_path.exists() and self.state() not in going

    def _refuse_foreign(self) -> None:
        """RunError where the folder has files of a run's names but is not a run folder."""
        if (self.path / "checkpoints").is_dir():
            return
        taken = [name for name in FILES if (self.path / name).exists()]
        if taken:
            raise RunError(
                f"{self.path} holds a {taken[0]} that is not a run's. Choose another --out."
            )

    def state(self) -> str | None:
        """The state last written: preparing, running, stopped, failed or finished; None without."""
        return read_state(self.path)

    def _take_lock(self) -> None:
        try:
            locked = self._lock.acquire()
        except BlockingIOError:
            raise RunError(
                f"{self.path} is in use by process {self._lock.owner() or 'unknown'}: wait for it, "
                "end it, or choose another --out."
            ) from None
        if not locked:
            self.log("this file system has no locks: nothing keeps a second run out of this folder")

    def take_request(self, name: str) -> bool:
        """Whether there was a file `requests/<name>`; deletes it."""
        try:
            (self.path / "requests" / name).unlink()
        except FileNotFoundError:
            return False
        return True

    def write_settings(self, config: str, inputs: dict[str, str]) -> None:
        """Write the resolved settings (TOML) and the inputs of `inputs_of`."""
        write_atomically(self.path / "config.toml", config.encode())
        write_atomically(self.path / "inputs.json", json.dumps(inputs, indent=1).encode())

    def has_settings(self) -> bool:
        """Whether `write_settings` was called for this folder."""
        return (self.path / "config.toml").exists() and (self.path / "inputs.json").exists()

    def read_settings(self) -> tuple[str, dict[str, str]]:
        """The settings (TOML) and inputs that `write_settings` wrote."""
        config = (self.path / "config.toml").read_text(encoding="utf-8")
        return config, json.loads((self.path / "inputs.json").read_text(encoding="utf-8"))

    def write_status(self, state: str, step: int, total: int) -> None:
        """Write the run's state and step to the status file."""
        status = {
            "state": state,
            "step": step,
            "total": total,
            "pid": os.getpid(),
            "time": round(time.time(), 3),
        }
        write_atomically(self.path / "status.json", json.dumps(status).encode())

    def close_as_failed(self, error: BaseException, total: int) -> None:
        """Write the state "failed" and log the error, if the folder is writable."""
        with suppress(OSError):
            self.write_status("failed", 0, total)
            self.log(f"failed: {type(error).__name__}: {error}")

    def write_metrics(self, **figures: Any) -> None:
        """Append a line to the metrics."""
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(figures) + "\n")

    def truncate_metrics(self, steps: int) -> None:
        """Delete the lines of steps after the first `steps`."""
        path = self.path / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        kept = [line for line in lines if _step_of(line) <= steps]
        write_atomically(path, "".join(f"{line}\n" for line in kept).encode())

    def log(self, line: str) -> None:
        """Append a line with the time to the log."""
        with (self.path / "log.txt").open("a", encoding="utf-8") as stream:
            stream.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")

    def save_checkpoint(
        self, adapter: Adapter, snapshot: Snapshot, keep: int, milestones: Sequence[int] = ()
    ) -> Path:
        """Write a checkpoint; delete older ones but the last `keep` and `milestones`; its path.

        A complete checkpoint of the step is not replaced, so that a crash cannot lose it.
        """
        final = self.path / "checkpoints" / f"step-{snapshot.step:06d}"
        if final.exists() and self._snapshot(final) is not None:
            return final
        partial = final.with_name(final.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        save_adapter(partial / "adapter.safetensors", adapter)
        write_atomically(
            partial / "training.safetensors", save(snapshot.tensors, {"step": str(snapshot.step)})
        )
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        always = {f"step-{step:06d}" for step in milestones}
        for old in [folder for folder in self.checkpoints() if folder.name not in always][:-keep]:
            shutil.rmtree(old)
        return final

    def newest_snapshot(self) -> Snapshot | None:
        """The newest snapshot that can be read; those that cannot are logged."""
        snapshots = map(self._snapshot, reversed(self.checkpoints()))
        return next((snapshot for snapshot in snapshots if snapshot is not None), None)

    def _snapshot(self, folder: Path) -> Snapshot | None:
        """A checkpoint's snapshot; None, with a line in the log, where it cannot be read."""
        try:
            tensors = load((folder / "training.safetensors").read_bytes())
        except (OSError, SafetensorError, ValueError) as error:
            self.log(f"{folder.name} cannot be read ({error}): going back to the one before")
            return None
        return Snapshot(int(folder.name.removeprefix("step-")), tensors)

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        folders = (self.path / "checkpoints").glob("step-*")
        return sorted(folder for folder in folders if folder.suffix != ".partial")
