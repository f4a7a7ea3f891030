"""Metrics for TensorBoard, Weights & Biases or Trackio, in addition to metrics.jsonl."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from accelerate.state import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from rite_diffusion.config import TrainConfig, flatten
from rite_diffusion.errors import ConfigError
from rite_diffusion.training.processes import without_ignored_variables
from rite_diffusion.training.trainer import StepReport


def _open(name: str, folder: Path, config: TrainConfig):
    tracker_class = LOGGER_TYPE_TO_CLASS[name]
    with without_ignored_variables():
        PartialState()  # through it, trackers find out whether this is the main process
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
    """Open trackers of a run folder; yields the function to call after each step.

    ConfigError for a tracker that is not installed.
    """
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
