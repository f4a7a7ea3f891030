"""The output of the commands."""

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from shlex import quote

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from rite_diffusion.adapters import Adapter, load_adapter
from rite_diffusion.adapters.storage import dtype_name
from rite_diffusion.api.convert import Export
from rite_diffusion.api.demo import DemoResult
from rite_diffusion.api.doctor import Finding
from rite_diffusion.api.fuse import Outcome
from rite_diffusion.backbones.sizes import describe_bytes, part_sizes, stored_bytes
from rite_diffusion.backbones.source import DTYPES
from rite_diffusion.config import TrainConfig
from rite_diffusion.files.writing import printable
from rite_diffusion.methods import METHODS
from rite_diffusion.methods.triggers import captions_without_trigger
from rite_diffusion.photos.findings import PhotoFinding, find_faults
from rite_diffusion.photos.folder import PhotoFolder
from rite_diffusion.training.plan import FoundPictures, Plan, PlanObserver
from rite_diffusion.training.rates import describe_schedule
from rite_diffusion.training.run import Cost
from rite_diffusion.training.trainer import StepReport

LONG_TRIGGER = 5  # tokens; "<dog>" has three
FAINT = 0.01  # share of white below which a mask is reported
LARGE = 10**9  # bytes of weights from which they are told
RECENT = 20  # steps whose loss and speed are shown as a mean
LINE_EVERY = 30.0  # seconds between two lines of progress where there is no terminal


def _line(label: str, text: str) -> None:
    _say(f"{label:<12}{text}")


def _say(text: str) -> None:
    print(printable(text))


class PlanPrinter(PlanObserver):
    """Prints a plan while it is made: photos found, then the training."""

    def found(self, pictures: FoundPictures, config: TrainConfig) -> None:
        """Print the pictures, and how large the base is."""
        describe_found(pictures, config)
        describe_weights(config)

    def planned(self, plan: Plan) -> None:
        """Print the training."""
        describe_training(plan)

    def drawing(self, line: str) -> None:
        """Print the progress of the class pictures."""
        _say(line)


def describe_weights(config: TrainConfig) -> None:
    """Print the sizes of a large base's parts, before it is opened."""
    dtype = DTYPES[config.precision]
    parts = stored_bytes(part_sizes(config.base), dtype, config.memory)
    if sum(parts.values()) >= LARGE:
        _line("weights", f"{describe_bytes(parts)} in {config.precision}")


def describe_found(found: FoundPictures, config: TrainConfig) -> None:
    """Print what was found in the photo folders, with what may be a mistake of the user."""
    folder = found.folder
    photos = folder.photos
    where = ", ".join(source.photos for source in config.sources())
    _line("photos", f"{len(photos)} in {where}, {folder.sizes()} pixels")
    templated = len(photos) - folder.captioned
    _line("captions", f"{folder.captioned} from files, {templated} from templates")
    _line("", f'e.g. "{photos[0].caption}"')
    for name, count, often in folder.repeats():
        _line("repeats", f"{name}: {count} photos, each shown {often} times an epoch")
    whites = [photo.white for photo in photos if photo.white is not None]
    if whites:
        share = f"{min(whites):.0%} to {max(whites):.0%} of each is white"
        _line("masks", f"{len(whites)} of {len(photos)} photos, {share}")
    _describe_classes(found, config)
    _describe_unused(folder)
    _describe_unused(found.classes)
    for photo in photos:
        if photo.white is not None and photo.white < FAINT:
            _line("faint mask", f"{photo.path.name}: {photo.white:.1%} of it is white")
    triggers = [concept.trigger for concept in config.concepts()]
    for caption in captions_without_trigger(folder, triggers):
        _line("no trigger", f'"{caption}" does not contain the trigger')
    for each, source in zip(found.folders, config.sources(), strict=True):
        describe_faults(find_faults(each, source.concept))
    if METHODS[config.method].wants_masks and not whites:
        _line("no masks", f"{config.method} learns better with them: see `rite mask --help`")
    sys.stdout.flush()


def describe_faults(findings: Sequence[PhotoFinding]) -> None:
    """Print what in photos will hurt a training, each with what to do."""
    for each in findings:
        _line(each.kind, f"{', '.join(each.photos)}: {each.text}; {each.remedy}")


def _describe_classes(found: FoundPictures, config: TrainConfig) -> None:
    """Print the class pictures, given and still to be drawn."""
    prior = config.prior
    given: dict[str, int] = {}
    for photo in found.classes.photos:
        given[str(photo.path.parent)] = given.get(str(photo.path.parent), 0) + 1
    for where, count in given.items():
        _line("class", f"{count} pictures in {where}, weight {prior.weight:g}")
    for noun in found.undrawn:
        _line("class", f"{prior.count} pictures for {noun} by the base, weight {prior.weight:g}")


def _describe_unused(folder: PhotoFolder) -> None:
    """Print the files that are not used, grouped by reason."""
    reasons: dict[str, list[str]] = {}
    for path, reason in folder.skipped:
        reasons.setdefault(reason, []).append(path.name)
    for reason, names in reasons.items():
        _line("skipped", f"{', '.join(names)}: {reason}")


def describe_training(plan: Plan) -> None:
    """Print views, concepts, base, adapter and schedule of a training."""
    _describe_views(plan)
    config, backbone, optim = plan.config, plan.backbone, plan.config.optim
    for concept in config.concepts():
        _line("concept", f"{concept.trigger}, class {concept.class_noun}")
    where = f"{backbone.device}, {config.resolution} pixels, {config.precision}"
    _line("base", f"{config.base} on {where}, attention {backbone.attention}")
    for fallback in plan.fallbacks:
        _line("", fallback)
    lora = config.lora
    start = f", from {lora.init_from}" if lora.init_from else ""
    start = f", start {lora.init}" if lora.init != "gaussian" else start
    kind = f" ({lora.kind})" if lora.kind != "lora" else ""
    size = f"factor {lora.factor}, whole" if lora.full_matrix else f"rank {lora.rank}"
    _line("adapter", f"{config.method}{kind}, {size}{start}")
    rates = f"{optim.name}, rate auto: tried out before the first step"
    if optim.lr_unet is not None:
        text = f", text encoder {optim.lr_text_encoder:g}" if config.trains_text_encoder else ""
        rates = f"{optim.name}, rate {optim.lr_unet:g}{text}"
    _line("training", f"{config.steps} steps of {config.batch}, {rates}, seed {config.seed}")
    _line("", describe_schedule(config))
    sys.stdout.flush()


def _describe_views(plan: Plan) -> None:
    """Print held-out photos, buckets, cut captions and photos that are scaled up."""
    budget = plan.backbone.token_budget
    if plan.held_out:
        _line("held out", ", ".join(photo.path.name for photo in plan.held_out))
    for (width, height), names in plan.buckets().items() if plan.config.buckets else ():
        _line("bucket", f"{width}x{height}: {', '.join(names)}")
    for concept in plan.config.concepts():
        tokens = plan.backbone.token_count(concept.trigger)
        if tokens > LONG_TRIGGER:
            of = f"of {budget} that a caption may have"
            _line("long", f"{concept.trigger} is read as {tokens} tokens {of}")
    for caption, trigger in plan.moved:
        end = f"beyond the {budget} tokens that the base reads"
        _line("moved", f'"{caption}" has {trigger} {end}: the caption now ends with it')
    for caption in plan.cut_captions():
        _line("cut", f'"{caption}" is longer than {budget} tokens')
    small = plan.folder.smaller_than(plan.encoding.resolution)
    if small:
        _line("scaled up", f"{', '.join(small)}: smaller than {plan.encoding.resolution} pixels")


def describe_cost(plan: Plan, cost: Cost) -> None:
    """Print the estimated time and memory of a run."""
    duration = timedelta(seconds=round(cost.seconds_per_step * plan.config.steps))
    each = f"{cost.seconds_per_step:.2f} s a step"
    _line("cost", f"about {duration} ({each}), {cost.peak_bytes / 1e9:.1f} GB of memory")


@contextmanager
def training_progress(steps: int) -> Iterator[Callable[[StepReport], None]]:
    """A progress bar with loss, images/s and time left; yields the function to call per step.

    Where standard output is not a terminal, it prints lines instead.
    """
    columns = (
        TextColumn("training  "),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TextColumn("{task.fields[speed]:.1f} images/s"),
        TimeRemainingColumn(),
    )
    recent, console = list[StepReport](), Console()
    if not console.is_terminal:
        yield _progress_lines(steps)
        return
    with Progress(*columns, console=console, transient=False) as bar:
        task = bar.add_task("", total=steps, loss=float("nan"), speed=0.0)

        def progress(report: StepReport) -> None:
            recent.append(report)
            del recent[:-RECENT]
            loss, speed = _recent_figures(recent)
            bar.update(task, completed=report.step, loss=loss, speed=speed)

        yield progress


def _recent_figures(recent: Sequence[StepReport]) -> tuple[float, float]:
    """Mean loss and images per second."""
    loss = sum(entry.loss for entry in recent) / len(recent)
    return loss, sum(entry.images_per_second for entry in recent) / len(recent)


def _progress_lines(steps: int) -> Callable[[StepReport], None]:
    """A function that prints a line after the first and last step, and every LINE_EVERY seconds.

    The second line is the first with the time left, as the first step includes preparations.
    """
    recent, printed = list[StepReport](), time.monotonic()
    first: tuple[int, float] | None = None  # the first step and when it was done

    def progress(report: StepReport) -> None:
        nonlocal printed, first
        recent.append(report)
        del recent[:-RECENT]
        now = time.monotonic()
        if first is not None and report.step != steps and now - printed < LINE_EVERY:
            return
        printed, (loss, speed) = now, _recent_figures(recent)
        text = f"step {report.step} of {steps}, loss {loss:.4f}, {speed:.1f} images/s"
        if first is not None:
            left = (now - first[1]) / (report.step - first[0]) * (steps - report.step)
            text += f", about {timedelta(seconds=round(left))} left"
        first = first or (report.step, now)
        _line("training", text)
        sys.stdout.flush()

    return progress


def describe_result(plan: Plan, adapter: Path) -> None:
    """Print the adapter's path and a command that draws with it."""
    size = adapter.stat().st_size / 1e6
    trigger = plan.config.concepts()[0].trigger
    prompt = f"a {trigger} on a blue background"
    if plan.config.base != "pocket":
        prompt = f"a photo of a {trigger} on a blue background"
    base = "" if plan.config.base == "pocket" else f" --base {quote(plan.config.base)}"
    _line("adapter", f"{adapter} ({size:.1f} MB)")
    _line("try", f"rite generate {quote(prompt)} --adapter {quote(str(adapter))}{base}")


def describe_adapter(path: Path, adapter: Adapter) -> None:
    """Print an adapter's header and contents."""
    facts = asdict(adapter.info)
    config, concepts = facts.pop("config"), facts.pop("concepts")
    ranks = ", ".join(str(rank) for rank in adapter.ranks())
    parameters = sum(pair.down.numel() + pair.up.numel() for pair in adapter.pairs)
    counts = {
        "UNet": sum(pair.name.startswith("lora_unet_") for pair in adapter.pairs),
        "text encoder": sum(pair.name.startswith("lora_te") for pair in adapter.pairs),
        "transformer": sum(pair.name.startswith("lora_transformer") for pair in adapter.pairs),
    }
    _say(f"{'file':<17}{path} ({path.stat().st_size / 1e6:.2f} MB)")
    for key, value in facts.items():
        _say(f"{key.replace('_', ' '):<17}{value or 'not stated'}")
    for entry in json.loads(concepts or "[]"):
        source = f"{entry['file']} at weight {entry['weight']:g}"
        _say(f"{'concept':<17}{entry['trigger']}, {entry['class_noun']}, from {source}")
    _say(f"{'dialect':<17}{adapter.dialect}")
    _say(f"{'rank':<17}{ranks or 'no layers'}")
    modules = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    if adapter.pairs:
        _say(f"{'modules':<17}{len(adapter.pairs)} ({modules}), {parameters:,} parameters")
    if adapter.shifts:
        _say(f"{'vectors':<17}{len(adapter.shifts)} biases and norm weights")
    for word, rows in adapter.tokens.items():
        layers, count, width = rows.shape
        _say(f"{'token':<17}{word} ({layers} layers of {count} x {width})")
    for note in adapter.notes:
        _say(f"{'note':<17}{note}")
    if config:
        _say("trained with")
        for line in config.strip().splitlines():
            _say(f"    {line}")


@contextmanager
def picture_progress(what: str = "pictures") -> Iterator[Callable[[int, int], None]]:
    """A progress bar of pictures; yields the function to call with pictures done and their number.

    Where standard output is not a terminal, it prints a line every LINE_EVERY seconds.
    """
    console = Console()
    if not console.is_terminal:
        yield _picture_lines(what)
        return
    columns = (TextColumn(f"{what:<10}"), BarColumn(bar_width=24), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _picture_lines(what: str) -> Callable[[int, int], None]:
    printed = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal printed
        if time.monotonic() - printed >= LINE_EVERY:
            printed = time.monotonic()
            _line(what, f"{done} of {total}")
            sys.stdout.flush()

    return progress


def describe_fused(path: Path) -> None:
    """Print a fused adapter's triggers and path."""
    info = load_adapter(path).info
    _line("concepts", info.trigger)
    _line("adapter", f"{path} ({path.stat().st_size / 1e6:.1f} MB)")


def describe_conflicts(outcome: Outcome) -> None:
    """Print crosstalk, errors before and after, the worst layers, and the files written."""
    report = outcome.report
    width = max(10, *(len(name) + 2 for name in report.concepts))
    _say(f"crosstalk   {'of':<{width}}" + "".join(f"{n:>{width}}" for n in report.concepts))
    for i, name in enumerate(report.concepts):
        cells = "".join(f"{value:>{width}.2f}" for value in report.crosstalk[i])
        _say(f"{'on':>10}  {name:<{width}}{cells}")
    _say(f"error       {'':<{width}}{'plain sum':>{width}}{report.method:>{width + 10}}")
    for name, before, after in zip(report.concepts, report.before, report.after, strict=True):
        _say(f"{'':<12}{name:<{width}}{before:>{width}.2f}{after:>{width + 10}.2f}")
    drift = f"{report.drift_before:>{width}.2f}{report.drift_after:>{width + 10}.2f}"
    _say(f"drift       {'':<{width}}{drift}")
    for layer in report.worst_layers()[:3]:
        _line("worst", f"{layer.worst:.2f} {layer.name}")
    describe_fused(outcome.adapter)
    _line("report", f"{outcome.sheet}, {outcome.json}")


def describe_export(export: Export) -> None:
    """Print the files of a conversion and the results of its checks."""
    _line("read", f"{len(export.adapter.pairs)} modules by the names of {export.adapter.dialect}")
    for note in export.adapter.notes:
        _line("note", note)
    read = dtype_name(export.adapter.dtype)
    was = "" if read == export.dtype else f"; {read} in the file that was read"
    if export.path not in export.embeddings:
        _line("wrote", f"{export.path} in {export.dtype}{was}")
    for path in export.embeddings:
        _line("embedding", str(path))
    for what, error in export.lossy.items():
        _line("lossy", f"{what}: relative error {error:.2g}")
    for check in export.checks:
        text = f"{check.modules} modules, largest relative difference {check.difference:.1e}"
        _line("verified", f"{text}, by {check.reader}")
    if export.pixels is not None:
        _line("pictures", f"largest difference {export.pixels} of 255, original against export")


def describe_findings(findings: list[Finding]) -> None:
    """Print the findings of `rite doctor`."""
    for finding in findings:
        _say(f"{'ok' if finding.good else '--':<4}{finding.name:<16}{finding.text}")
        if finding.remedy:
            _say(f"    {'':<16}{finding.remedy}")


def describe_demo(result: DemoResult) -> None:
    """Print the demo's figures and the path of its grid."""
    _line("adapter", str(result.adapter))
    _line("identity", f"{result.before:.2f} before, {result.after:.2f} after (1 is the photos')")
    before, after = result.recognised_before, result.recognised_after
    _line("recognised", f"{before:.0%} of the pictures before, {after:.0%} after, by the judge")
    _line("grid", str(result.grid))
