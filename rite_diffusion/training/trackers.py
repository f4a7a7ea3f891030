"""Metrics to TensorBoard, Weights & Biases or Trackio, beside the run folder's metrics.jsonl."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from accelerate.state import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from rite_diffusion.config import TrainConfig, flatten
from rite_diffusion.errors import ConfigError
from rite_diffusion.training.processes import without_leftovers
from rite_diffusion.training.trainer import StepReport


def _open(name: str, folder: Path, config: TrainConfig):
    tracker_class = LOGGER_TYPE_TO_CLASS[name]
    with without_leftovers():
        PartialState()  # trackers ask it whether they are on the main process
    try:
        if tracker_class.requires_logging_directory:
            tracker = tracker_class(run_name=folder.name, logging_dir=folder / "trackers")
        else:
            tracker = tracker_class(run_name=folder.name)
        tracker.start()
    except ImportError as error:
        raise ConfigError(
            f"tracker '{name}' is not installed ({error}): pip install 'rite-diffusion[tracking]'"
        ) from None
    settings = flatten(config.model_dump(exclude_none=True))
    tracker.store_init_configuration({key: str(value) for key, value in settings.items()})
    return tracker


@contextmanager
def open_trackers(
    names: Sequence[str], folder: Path, config: TrainConfig
) -> Iterator[Callable[[StepReport], None]]:
    """Trackers of a run folder; yields what to call after each step."""
    trackers = [_open(name, folder, config) for name in names]

    def track(report: StepReport) -> None:
        figures = {"loss": report.loss, "rate": report.rate, "validation": report.validation}
        values = {key: value for key, value in figures.items() if value is not None}
        for tracker in trackers:
            tracker.log(values, step=report.step)

    try:
        yield track
    finally:
        for tracker in trackers:
            tracker.finish()
