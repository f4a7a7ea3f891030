"""Running a plan: the adapter is trained in a run folder from which it can be resumed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from rite_diffusion._version import __version__
from rite_diffusion.adapters import Adapter, AdapterInfo, save_adapter
from rite_diffusion.adapters.adapter import base_name
from rite_diffusion.adapters.learned_embeddings import tokens_of
from rite_diffusion.config import to_toml, without_paths
from rite_diffusion.errors import ConfigError, RiteError, RunError
from rite_diffusion.files.writing import user_path
from rite_diffusion.methods import METHODS, Method
from rite_diffusion.optim import optimizer_spec
from rite_diffusion.training.assistant import act_together, assisted
from rite_diffusion.training.interrupt import stop_on_signal
from rite_diffusion.training.job import Job
from rite_diffusion.training.lock import is_in_use
from rite_diffusion.training.memory import peak_memory
from rite_diffusion.training.plan import Plan
from rite_diffusion.training.previews import write_previews
from rite_diffusion.training.probe import probe_rates
from rite_diffusion.training.processes import is_main_process, process_count
from rite_diffusion.training.resume import (
    begin_or_continue,
    changes,
    refuse_finished,
    with_earlier_rates,
)
from rite_diffusion.training.run_folder import RunFolder
from rite_diffusion.training.snapshot import Snapshot
from rite_diffusion.training.stages import Encoded, encode
from rite_diffusion.training.trackers import open_trackers
from rite_diffusion.training.trainer import StepReport, train_steps

LICENCE = "unspecified"


class Stopped(RiteError):
    """A signal ended the run early; the adapter of the last step is written."""

    def __init__(self, adapter: Path, step: int, signal: int):
        super().__init__(f"stopped at step {step}; the adapter of that step is {adapter}")
        self.signal = signal


def _adapter(plan: Plan, method: Method, step: int) -> Adapter:
    """The adapter after `step` steps; its header holds no absolute paths."""
    config, concepts = plan.config, plan.config.concepts()
    base = base_name(config.base)
    info = AdapterInfo(
        trigger=", ".join(concept.trigger for concept in concepts),
        class_noun=", ".join(concept.class_noun for concept in concepts),
        base=base,
        base_fingerprint=plan.backbone.fingerprint,
        family=plan.backbone.family,
        method=config.method,
        optimizer=config.optim.name,
        steps=str(step),
        images=str(len(plan.folder.photos)),
        config=to_toml(without_paths(config.model_copy(update={"base": base}))),
        licence=LICENCE,
        version=__version__,
    )
    tokens = tokens_of(method.embeddings())
    return Adapter(method.pairs(), info, tokens, products=method.products())


def run_training(
    plan: Plan,
    out: Path,
    on_step: Callable[[StepReport], None] = lambda report: None,
    override: bool = False,
) -> Path:
    """Train a plan in the run folder `out` and return the path of the adapter file.

    A run that was stopped or killed is resumed from its newest checkpoint, with the same result as
    without interruption; a finished one where more steps are wanted. Raises RunError where settings
    or inputs have changed since, unless `override`, and Stopped after Ctrl-C or SIGTERM, once the
    adapter of the last step is written.
    """
    if not is_main_process():
        return _train_beside(plan, RunFolder(out))
    total = plan.config.steps
    refuse_finished(RunFolder(out), plan.config)  # before anything is written there
    with RunFolder(out) as run, stop_on_signal() as request:
        config = with_earlier_rates(run, plan.config)
        resume = begin_or_continue(run, config, plan.inputs(), override)
        _log_beginning(run, replace(plan, config=config))
        run.write_status("preparing", resume.step if resume else 0, total)
        try:
            plan = _with_rates(replace(plan, config=config), run)
            done = _train(plan, run, on_step, request.is_set, resume)
        except BaseException as error:
            run.close_as_failed(error, total)
            if isinstance(error, OSError):
                raise RunError(
                    f"cannot write to {out}: {error.strerror or error}. Make room or choose "
                    "another --out; the newest checkpoint is whole, and the same command goes on."
                ) from error
            raise
        run.write_status("finished" if done == total else "stopped", done, total)
        run.log(f"wrote {run.adapter_path.name} after {done} steps")
        if request.signal is not None and done < total:
            raise Stopped(run.adapter_path, done, request.signal)
    return run.adapter_path


def _log_beginning(run: RunFolder, plan: Plan) -> None:
    """Log version, base, device and settings that cannot be followed."""
    run.log(f"rite_diffusion {__version__}, {len(plan.folder.photos)} photos")
    base, precision = plan.backbone, plan.config.precision
    threads = f" ({torch.get_num_threads()} threads)" if base.device.type == "cpu" else ""
    where = f"{base.device}{threads}, {precision}, attention {base.attention}"
    run.log(f"{plan.config.base} on {where}")
    for fallback in plan.fallbacks:
        run.log(fallback)


def _with_rates(plan: Plan, run: RunFolder) -> Plan:
    """The plan with every rate set; with `optim.lr = "auto"` by a probe, which is logged."""
    config = plan.config
    if config.optim.lr_unet is not None:
        return plan
    if process_count() > 1:
        raise ConfigError("optim.lr = auto needs one process: probe first, then pass the rate.")
    data = encode(plan).data
    default = optimizer_spec(config.optim.name).lr
    losses = probe_rates(
        plan.backbone, lambda each: METHODS[each.method](plan.backbone, each), data, config, default
    )
    run.log(f"probe: {', '.join(f'rate {r:g}: loss {value:.4f}' for r, value in losses.items())}")
    config = config.with_rates(min(losses, key=lambda rate: losses[rate]))
    run.write_settings(to_toml(config), plan.inputs())
    return replace(plan, config=config)


def _train(
    plan: Plan,
    run: RunFolder,
    on_step: Callable[[StepReport], None],
    stop: Callable[[], bool],
    resume: Snapshot | None,
) -> int:
    """Train in an open run folder, write the adapter, and return the number of steps done."""
    config = plan.config

    def after_step(report: StepReport) -> None:
        step = report.step
        run.write_metrics(**{k: v for k, v in vars(report).items() if v not in (None, [])})
        if report.skipped:
            run.log(f"step {step} left out, no number came of {', '.join(report.skipped)}")
        track(report)
        due = config.previews.every and step % config.previews.every == 0
        if run.take_request("sample") or due:
            write_previews(plan.backbone, config, run, step, encoded.previews)
        on_step(report)

    def save(snapshot: Snapshot, last: bool) -> None:
        adapter = _adapter(plan, job.method, snapshot.step)
        kept = config.checkpoints
        run.save_checkpoint(adapter, snapshot, kept.keep, kept.milestones)
        run.write_status("running", snapshot.step, config.steps)
        if last:
            save_adapter(run.adapter_path, adapter)

    encoded = encode(plan)
    with _job(plan, encoded) as job, open_trackers(config.trackers, run.path, config) as track:
        run.write_status("running", resume.step if resume else 0, config.steps)
        return train_steps(job, after_step, save, stop, resume, lambda: run.take_request("save"))


def _train_beside(plan: Plan, run: RunFolder) -> Path:
    """Train in a process other than the main one, which writes; returns the adapter's path."""
    resume = run.newest_snapshot()
    with stop_on_signal() as request, _job(plan, encode(plan)) as job:
        train_steps(job, lambda _: None, stop=request.is_set, resume=resume)
    if not run.adapter_path.exists():
        raise RunError(
            f"no {run.adapter_path} on this machine: all processes of a run need one run folder."
        )
    return run.adapter_path


@contextmanager
def _job(plan: Plan, encoded: Encoded) -> Iterator[Job]:
    """A job, with the method in the backbone until the block ends."""
    backbone, config = plan.backbone, plan.config
    with assisted(backbone, config):
        method = METHODS[config.method](backbone, config)
        act_together(backbone, config)
        try:
            yield Job(backbone, method, encoded.data, config, encoded.held_out)
        finally:
            method.remove()
            backbone.recall()


@dataclass(frozen=True)
class Cost:
    """Time and memory of a run, measured on its first steps."""

    seconds_per_step: float
    peak_bytes: int  # of main memory, or of a CUDA device's


def measure(plan: Plan) -> Cost:
    """The cost of a plan, measured on its second step; nothing is written."""
    config, reports = plan.config, list[StepReport]()
    if config.optim.lr_unet is None:
        config = config.with_rates(optimizer_spec(config.optim.name).lr)
    short = replace(plan, config=config.model_copy(update={"steps": 2}), held_out=[])
    with _job(short, encode(short)) as job:
        train_steps(job, reports.append)
    pictures = config.batch * config.accumulate * process_count()
    seconds = pictures / reports[-1].images_per_second
    return Cost(seconds, peak_memory(plan.backbone.device))


def default_run(plan: Plan) -> Path:
    """The run folder of a plan: that of an unfinished run with the same settings, or a new one.

    Names are runs/name, runs/name-2, … after the photo folder.
    """
    if process_count() > 1:
        raise ConfigError("several processes need one run folder: pass --out")
    name = user_path(plan.config.sources()[0].photos).resolve().name or "run"
    candidates = [Path("runs") / name, *(Path("runs") / f"{name}-{i}" for i in range(2, 10_000))]
    return next(path for path in candidates if not path.exists() or _goes_on(plan, path))


def _goes_on(plan: Plan, path: Path) -> bool:
    """Whether a run folder holds an unfinished run of this plan that no process works on."""
    run = RunFolder(path)
    if run.state() == "finished" or is_in_use(path) or not run.has_settings():
        return False
    return not changes(run, with_earlier_rates(run, plan.config), plan.inputs())
