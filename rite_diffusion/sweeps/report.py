"""What a sweep has found: a table, a plot for each axis, and a sheet of the pictures."""

import csv
import io
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from rite_diffusion.files.writing import write_atomically, write_output
from rite_diffusion.generation.grid import labelled_grid
from rite_diffusion.sweeps.axes import label_of
from rite_diffusion.sweeps.definition import Definition
from rite_diffusion.sweeps.folder import Job, SweepFolder, steps_done
from rite_diffusion.sweeps.runs import SweepRun
from rite_diffusion.sweeps.schedule import Candidate, rank, schedule, score_of
from rite_diffusion.sweeps.scores import read_metrics

RECENT = 20  # steps over which the loss is averaged
DECADES = 1.5  # of numbers on an axis, from which a plot's axis is logarithmic
SHEET_ROWS = 200
CELL = 128  # pixels of a picture on the sheet


@dataclass(frozen=True)
class SweepRow:
    """One run of a sweep's table."""

    name: str
    path: Path  # the run folder
    values: dict[str, str]  # axis -> label
    state: str  # finished, running, failed, stopped, waiting or dropped
    steps: int  # done
    loss: float | None  # mean of the last 20 steps
    score: float | None
    images_per_second: float | None  # median of all steps
    reason: str  # why it has failed, else empty


@dataclass(frozen=True)
class SweepResult:
    """A sweep's runs, and its candidates from the best to the worst."""

    folder: Path
    rows: list[SweepRow]
    ranking: list[Candidate]

    @property
    def best(self) -> Candidate | None:
        """The candidate with the best mean score, None where none has one."""
        return self.ranking[0] if self.ranking else None


def read_result(
    definition: Definition, runs: Sequence[SweepRun], folder: SweepFolder
) -> SweepResult:
    """What is on disk of a sweep."""
    newest: dict[str, Job] = {}
    remaining: set[str] = set()
    jobs: list[Job] = []
    for jobs in schedule(definition, runs, folder):
        newest |= {job.run.name: job for job in jobs}
        remaining = {job.run.name for job in jobs}
        if any(folder.state(job) not in ("finished", "failed") for job in jobs):
            break
    rows = [_row(folder, newest[run.name], definition, run.name in remaining) for run in runs]
    ranking = rank(jobs, definition.section.score)
    return SweepResult(folder.path, rows, ranking)


def _row(folder: SweepFolder, job: Job, definition: Definition, remains: bool) -> SweepRow:
    state = folder.state(job)
    metrics = list(read_metrics(job.path))
    return SweepRow(
        name=job.run.name,
        path=job.path,
        values=job.run.values,
        state=state if remains or state == "failed" else "dropped",
        steps=max((line["step"] for line in metrics), default=steps_done(job.path)),
        loss=_mean([line["loss"] for line in metrics[-RECENT:]]),
        score=score_of(job, definition.section.score),
        images_per_second=_median([line["images_per_second"] for line in metrics]),
        reason=folder.failures().get(job.run.name, "") if state == "failed" else "",
    )


def _mean(values: list[float]) -> float | None:
    finite = [value for value in values if math.isfinite(value)]
    return statistics.mean(finite) if finite else None


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


def table(result: SweepResult, score: str) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of the table; numbers to six significant digits."""
    axes = list(result.rows[0].values) if result.rows else []
    heads = ["run", *axes, "state", "steps", "loss", score, "images_per_second", "reason"]
    lines = [
        [
            row.name,
            *row.values.values(),
            row.state,
            str(row.steps),
            *(_number(value) for value in (row.loss, row.score, row.images_per_second)),
            row.reason,
        ]
        for row in result.rows
    ]
    return heads, lines


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def write_report(result: SweepResult, definition: Definition) -> list[Path]:
    """Write table.csv, plots/<axis>.png and sheet.png, and return their paths.

    Plots need matplotlib, and runs with a score; the sheet needs runs with previews.
    """
    heads, lines = table(result, definition.section.score)
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerows([heads, *lines])
    written = [result.folder / "table.csv"]
    write_atomically(written[0], stream.getvalue().encode())
    written += _write_plots(result, definition)
    if (picture := sheet(result)) is not None:
        written.append(result.folder / "sheet.png")
        content = io.BytesIO()
        picture.save(content, "PNG")
        write_atomically(written[-1], content.getvalue())
    return written


def _write_plots(result: SweepResult, definition: Definition) -> list[Path]:
    rows = [row for row in result.rows if row.score is not None]
    written = []
    for axis in definition.axes if rows else ():
        content = plot(rows, axis.name, definition.section.score)
        if content is None:
            break
        written.append(result.folder / "plots" / f"{label_of('', axis.name)}.png")
        write_output(written[-1], content)
    return written


def plot(rows: Sequence[SweepRow], axis: str, score: str) -> bytes | None:
    """A PNG of scores over an axis, and their means; None without matplotlib.

    Each of `rows` has a score.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    labels = list(dict.fromkeys(row.values[axis] for row in rows))
    numbers = _numbers(labels)
    at = numbers or {label: float(index) for index, label in enumerate(labels)}
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    places = [at[row.values[axis]] for row in rows]
    scores = [row.score for row in rows if row.score is not None]
    axes.scatter(places, scores, s=16, alpha=0.6, color="#3563a5")
    groups: dict[float, list[float]] = {place: [] for place in sorted(set(places))}
    for place, value in zip(places, scores, strict=True):
        groups[place].append(value)
    axes.plot(list(groups), [statistics.mean(own) for own in groups.values()], color="#24477a")
    if numbers is None:
        axes.set_xticks(range(len(labels)), labels, rotation=30, ha="right")
    elif min(places) > 0 and math.log10(max(places) / min(places)) >= DECADES:
        axes.set_xscale("log")
    axes.set(xlabel=axis, ylabel=score)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150)
    return content.getvalue()


def _numbers(labels: Sequence[str]) -> dict[str, float] | None:
    """Label -> its number; None where one is none."""
    try:
        return {label: float(label) for label in labels}
    except ValueError:
        return None


def sheet(result: SweepResult) -> Image.Image | None:
    """Each run's newest previews, a row for each run, the first 200; None where no run has any."""
    found = [(row, files) for row in result.rows if (files := newest_previews(row.path))]
    if not found:
        return None
    rows, labels = [], []
    for row, files in found[:SHEET_ROWS]:
        pictures = []
        for file in files:
            with Image.open(file) as picture:
                pictures.append(picture.convert("RGB"))
        rows.append(pictures)
        score = "" if row.score is None else f" score {row.score:.4g}"
        labels.append(f"{row.name.replace(',', ' ')} step {_step(files[0])}{score}")
    columns = max(len(row) for row in rows)
    return labelled_grid(rows, labels, [f"prompt {n + 1}" for n in range(columns)], CELL, 260)


def newest_previews(run: Path) -> list[Path]:
    """The previews of the last step that has any, prompt by prompt."""
    files = list((run / "previews").glob("step-*-*.png"))
    last = max((_step(file) for file in files), default=0)
    newest = [file for file in files if _step(file) == last]
    return sorted(newest, key=lambda file: int(file.stem.split("-")[2]))


def _step(preview: Path) -> int:
    return int(preview.stem.split("-")[1])
