"""The folder of a sweep: one ordinary run folder for each run, and what the sweep adds.

sweep.toml  failures.json  lock  table.csv  sheet.png  plots/<axis>.png
<run>/job.toml  the settings that were asked for; all other files are those of `rite train`
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomlkit

from rite_diffusion.config import flatten, read_toml
from rite_diffusion.errors import RunError
from rite_diffusion.files.writing import read_json, write_atomically
from rite_diffusion.sweeps.definition import Definition
from rite_diffusion.sweeps.runs import SweepRun
from rite_diffusion.training.lock import Lock, is_in_use
from rite_diffusion.training.resume import FREE
from rite_diffusion.training.run_folder import RunFolder

# Settings in which a run that was begun may differ: those without effect, and its length.
MAY_CHANGE = FREE - {"photos", "class_photos"} | {"steps"}


@dataclass(frozen=True)
class Job:
    """A run that shall have done so many steps."""

    run: SweepRun
    path: Path
    steps: int
    preset: str | None

    @property
    def settings(self) -> dict[str, Any]:
        """The tree that `rite train` takes."""
        return self.run.settings | {"steps": self.steps}

    def is_complete(self) -> bool:
        """Whether the run has done its steps and holds its adapter, or has gone further."""
        return is_complete(self.path, self.steps)

    def refuse_changed(self) -> None:
        """RunError where the folder holds a run of other settings, or one that has gone further."""
        path = self.path / "job.toml"
        if not path.exists():
            return
        before, now = (_compared(tree) for tree in (read_toml(path), self.settings))
        keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        if steps_done(self.path) > self.steps:
            raise RunError(
                f"{self.path} has done {steps_done(self.path)} steps, {self.steps} are wanted: ask "
                "for as many or more, choose another --out, or delete that folder."
            )
        if keys:
            found = "; ".join(
                f"{key}: {before.get(key, 'none')} -> {now.get(key, 'none')}" for key in keys
            )
            raise RunError(
                f"{self.path} was begun differently ({found}). Choose another --out for the "
                "changed sweep, or delete that folder."
            )

    def write_settings(self) -> Path:
        """Write job.toml, which starts the run, and return its path."""
        self.path.mkdir(parents=True, exist_ok=True)
        path = self.path / "job.toml"
        write_atomically(path, tomlkit.dumps(self.settings).encode())
        return path


def _compared(tree: dict[str, Any]) -> dict[str, Any]:
    return flatten({key: value for key, value in tree.items() if key not in MAY_CHANGE})


def steps_done(run: Path) -> int:
    """The steps of a run's adapter if it is finished, else of its newest checkpoint."""
    status = read_json(run / "status.json")
    if status.get("state") == "finished":
        return status.get("step", 0)
    newest = [int(path.name.removeprefix("step-")) for path in RunFolder(run).checkpoints()[-1:]]
    return newest[0] if newest else 0


def is_complete(run: Path, steps: int) -> bool:
    """Whether a run has done `steps` steps and written its adapter, or has gone further."""
    done = steps_done(run)
    finished = read_json(run / "status.json").get("state") == "finished"
    return done > steps or (finished and done == steps)


class SweepFolder:
    """A sweep's folder; as a context manager it is made and locked.

    Raises RunError where another process works on the sweep, or it was another sweep's.
    """

    def __init__(self, path: Path):
        self.path = path
        self._lock = Lock(path / "lock")

    def __enter__(self) -> "SweepFolder":
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire()
        except BlockingIOError:
            raise RunError(
                f"{self.path} is in use by process {self._lock.owner() or 'unknown'}: wait for it, "
                "end it, or choose another --out."
            ) from None
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def job(self, run: SweepRun, steps: int, preset: str | None) -> Job:
        """A run of this sweep, to do so many steps."""
        return Job(run, self.path / run.name, steps, preset)

    def refuse_foreign(self, definition: Definition) -> None:
        """RunError for a folder of other things, or a sweep with another preset."""
        if not self.path.exists():
            return
        written = self.path / "sweep.toml"
        if not written.exists():
            if any(each.name != "lock" for each in self.path.iterdir()):
                raise RunError(f"{self.path} is not a sweep's folder: choose another --out.")
            return
        before = read_toml(written).get("sweep", {}).get("preset")
        if before != definition.section.preset:
            raise RunError(
                f"{self.path} was begun with preset {before or 'by default'}: choose another --out."
            )

    def write_definition(self, definition: Definition) -> None:
        """Write sweep.toml, from which the sweep can be continued."""
        table = definition.section.model_dump(exclude_none=True, exclude_unset=True)
        content = tomlkit.dumps(definition.settings | {"sweep": table})
        write_atomically(self.path / "sweep.toml", content.encode())

    def failures(self) -> dict[str, str]:
        """Name of each run that has failed -> why."""
        return read_json(self.path / "failures.json")

    def write_failure(self, name: str, reason: str | None) -> None:
        """Remember why a run has failed, or with None that it has not."""
        before = self.failures()
        failures = {key: value for key, value in before.items() if key != name}
        if reason is not None:
            failures[name] = reason
        if failures == before:
            return
        write_atomically(self.path / "failures.json", json.dumps(failures, indent=1).encode())

    def state(self, job: Job) -> str:
        """The run's state: finished, running, failed, stopped (it will go on) or waiting."""
        if job.is_complete():
            return "finished"
        if is_in_use(job.path):
            return "running"
        if job.run.name in self.failures():
            return "failed"
        return "stopped" if (job.path / "status.json").exists() else "waiting"
