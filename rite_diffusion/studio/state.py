"""State that all tabs share: the workspaces, the engine that draws, the queue of trainings."""

import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import gradio as gr

from rite_diffusion.errors import StudioError
from rite_diffusion.studio.checks import Reports
from rite_diffusion.studio.jobs import JobQueue
from rite_diffusion.studio.workspace import Workspace
from rite_diffusion.training.launch import devices

if TYPE_CHECKING:
    from rite_diffusion.studio.engine import Engine

DEVICE = "device"  # concurrency_id of every event that uses the model: one at a time
PAUSE = 1.0  # seconds between checks of the queue
START_DELAY = 6.0  # seconds for the first page before torch is imported, which slows it


class Studio:
    """One server's state; all that must survive a restart is in files."""

    def __init__(self, root: Path, with_logins: bool):
        self.root = root
        self.with_logins = with_logins
        self.reports = Reports()
        self.queue = JobQueue(self.all_runs, devices)
        self._engine: Engine | None = None
        self._lock = threading.Lock()
        self._visited = threading.Event()

    def space(self, request: gr.Request | None) -> Workspace:
        """The workspace of the user who sent a request; StudioError without a login."""
        self._visited.set()
        if not self.with_logins:
            return Workspace(self.root)
        user = request.username if request else None
        if not user:
            raise StudioError("log in first: reload the page.")
        return Workspace(self.root / "users" / user)

    def spaces(self) -> list[Workspace]:
        """Every user's workspace."""
        if not self.with_logins:
            return [Workspace(self.root)]
        return [Workspace(path) for path in sorted((self.root / "users").glob("*"))]

    def all_runs(self) -> list[Path]:
        """Every user's run folders."""
        folders = [path for space in self.spaces() for path in space.folder("runs").iterdir()]
        return [path for path in folders if path.is_dir()]

    @property
    def engine(self) -> "Engine":
        """The engine that draws; made at first use, as it imports torch."""
        with self._lock:
            if self._engine is None:
                from rite_diffusion.studio.engine import Engine

                self._engine = Engine()
            return self._engine

    def start_threads(self) -> None:
        """Start the threads that open the pocket base and start queued runs."""
        for work in (self._prepare_engine, self._start_runs):
            threading.Thread(target=work, daemon=True, name=work.__name__).start()

    def _prepare_engine(self) -> None:
        self._visited.wait(START_DELAY)
        self.engine.open_pocket()

    def _start_runs(self) -> None:
        self._visited.wait(START_DELAY)
        while True:
            try:
                self.queue.start_waiting()
            except OSError as error:
                print(f"rite studio: cannot start a run: {error}", file=sys.stderr)
            time.sleep(PAUSE)
