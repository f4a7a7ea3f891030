"""What runs jobs: processes of this machine (`machine.py`) or a Ray cluster (`cluster.py`)."""

from collections.abc import Callable, Sequence

from rite_diffusion.errors import RiteError
from rite_diffusion.sweeps.folder import Job

OnEnd = Callable[[Job, str | None], None]  # called with a job, and why it has failed
Runner = Callable[[Sequence[Job], OnEnd], None]


class SweepStopped(RiteError):
    """A signal ended the sweep early."""

    def __init__(self, signal: int):
        super().__init__("stopped: the same command goes on with the sweep")
        self.signal = signal
