"""The whole flow on one screen: a photo folder becomes an adapter, a prompt becomes pictures."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL.Image import Image

import rite_diffusion
from rite_diffusion.adapters import Adapter, AdapterInfo, attach, load_adapter, save_adapter
from rite_diffusion.adapters.choice import Chosen, choose_adapters
from rite_diffusion.backbones import StableDiffusion, load_backbone
from rite_diffusion.concepts import METHODS, Method
from rite_diffusion.config import (
    TrainConfig,
    load_preset,
    merge,
    resolve,
    to_toml,
)
from rite_diffusion.fusion.members import triggers_of
from rite_diffusion.generation.metadata import parameters_of, save_png
from rite_diffusion.generation.output import next_file, output_target
from rite_diffusion.generation.regional import Attached, sample_regions
from rite_diffusion.generation.regions import adapter_weights, parse_region
from rite_diffusion.generation.sampler import Sampling, checked_size, sample
from rite_diffusion.photos.dataset import LatentSet, encode_photos, target_sizes
from rite_diffusion.photos.folder import PhotoFolder, read_folder
from rite_diffusion.training.interrupt import stop_on_signal
from rite_diffusion.training.loop import StepReport, optimizer_spec, train_steps
from rite_diffusion.training.processes import is_main_process, process_count
from rite_diffusion.training.resume import begin_or_continue, changes, inputs_of
from rite_diffusion.training.run_folder import RunFolder
from rite_diffusion.training.snapshot import Snapshot
from rite_diffusion.types import AdapterError, Backbone, Concept, ConfigError, RiteError

LICENCE = "unspecified"
ATTACHED = "adapter_{}"  # names of attached adapters


class Stopped(RiteError):
    """A signal ended the run early; what was learned until then is in the adapter."""

    def __init__(self, adapter: Path, step: int, signal: int):
        super().__init__(f"stopped at step {step}; the adapter of that step is {adapter}")
        self.signal = signal


@dataclass(frozen=True)
class Plan:
    """A checked training run, ready to start."""

    config: TrainConfig
    backbone: StableDiffusion
    folder: PhotoFolder

    def cut_captions(self) -> list[str]:
        """Captions longer than the base model's token budget."""
        budget = self.backbone.token_budget
        captions = {photo.caption for photo in self.folder.photos}
        return sorted(text for text in captions if self.backbone.token_count(text) > budget)

    def inputs(self) -> dict[str, str]:
        """What the run learns from and with, for a continued run to compare."""
        return inputs_of(self.folder.photos, self.backbone.fingerprint)

    def buckets(self) -> dict[tuple[int, int], list[str]]:
        """Size (width, height) that is trained on -> names of the photos cut to it."""
        photos, config = self.folder.photos, self.config
        side = config.resolution or self.backbone.resolution
        table: dict[tuple[int, int], list[str]] = {}
        for photo, size in zip(
            photos, target_sizes(photos, side, self.backbone.multiple, config.buckets), strict=True
        ):
            table.setdefault(size, []).append(photo.path.name)
        return dict(sorted(table.items()))

    def captions_without_trigger(self) -> list[str]:
        """Captions that never teach the trigger."""
        return [p.caption for p in self.folder.photos if self.config.trigger not in p.caption]


def configure(settings: dict[str, Any], preset: str | None = None) -> TrainConfig:
    """The resolved configuration: settings over a preset, every rate filled in.

    The preset defaults to `pocket` on the pocket base and to `sd15` elsewhere. A preset's rates
    belong to its optimizer: another optimizer without a rate takes its own default.
    """
    on_pocket = settings.get("base", "pocket") == "pocket"
    low = load_preset(preset or ("pocket" if on_pocket else "sd15"))
    chosen = settings.get("optim", {}).get("name")
    if chosen and chosen != low.get("optim", {}).get("name"):
        kept = {k: v for k, v in low["optim"].items() if not k.startswith("lr")}
        low = low | {"optim": kept}
    if "lr" in settings.get("optim", {}):
        low.get("optim", {}).pop("lr_text_encoder", None)
    config = resolve(merge(low, settings))
    optim = config.optim
    lr = optim.lr or optimizer_spec(optim.name).lr
    rates = {
        "lr": lr,
        "lr_unet": optim.lr_unet or lr,
        "lr_text_encoder": optim.lr_text_encoder or lr / 2,
    }
    return config.model_copy(update={"optim": optim.model_copy(update=rates)})


def plan_training(config: TrainConfig) -> Plan:
    """Read the photos and open the base; raises a RiteError for all that cannot be trained on."""
    concept = Concept(config.trigger, config.class_noun)
    folder = read_folder(Path(config.photos).expanduser(), concept, config.templates)
    backbone = load_backbone(config.base, config.precision)
    if backbone.is_known_word(config.trigger):
        raise ConfigError(
            f"trigger '{config.trigger}' is a word that {config.base} already knows, and training "
            f"would overwrite it: use a new word such as '<{config.trigger}>'."
        )
    side = config.resolution or backbone.resolution
    if side % backbone.multiple:
        raise ConfigError(f"resolution {side} is not a multiple of {backbone.multiple} pixels")
    config = config.model_copy(update={"resolution": side})
    return Plan(config, backbone, folder)


def _adapter(plan: Plan, method: Method, step: int) -> Adapter:
    """The adapter as trained so far; its header holds no absolute path."""
    config = plan.config
    base = Path(config.base).name if Path(config.base).exists() else config.base
    public = config.model_copy(update={"photos": Path(config.photos).name, "base": base})
    info = AdapterInfo(
        trigger=config.trigger,
        class_noun=config.class_noun,
        base=base,
        base_fingerprint=plan.backbone.fingerprint,
        method=config.method,
        optimizer=config.optim.name,
        steps=str(step),
        images=str(len(plan.folder.photos)),
        config=to_toml(public),
        licence=LICENCE,
        version=rite_diffusion.__version__,
    )
    return Adapter(method.pairs(), info)


def _write_previews(plan: Plan, run: RunFolder, step: int) -> None:
    previews = plan.config.previews
    prompts = [p.replace("{trigger}", plan.config.trigger) for p in previews.prompts]
    for index, prompt in enumerate(prompts):
        [image] = sample(
            plan.backbone,
            [prompt],
            [previews.seed],
            steps=previews.steps,
            guidance=previews.guidance,
        )
        image.save(run.path / "previews" / f"step-{step:06d}-{index}.png")


def run_training(
    plan: Plan,
    out: Path,
    listen: Callable[[StepReport], None] = lambda report: None,
    override: bool = False,
) -> Path:
    """Train, and return the path of the adapter file in the run folder `out`.

    A run that was stopped or killed goes on from its newest checkpoint, as if it had never been
    interrupted; RunError tells what has changed since, unless `override` accepts it. Raises Stopped
    after Ctrl-C or SIGTERM, once the adapter of the last step is written.
    """
    if not is_main_process():
        return _follow(plan, RunFolder(out))
    total = plan.config.steps
    with RunFolder(out) as run, stop_on_signal() as request:
        resume = begin_or_continue(run, plan.config, plan.inputs(), override)
        run.log(f"rite_diffusion {rite_diffusion.__version__}, {len(plan.folder.photos)} photos")
        run.write_status("preparing", resume.step if resume else 0, total)
        try:
            done = _learn(plan, run, listen, request.is_set, resume)
        except BaseException as error:
            run.write_status("failed", 0, total)
            run.log(f"failed: {type(error).__name__}: {error}")
            raise
        run.write_status("finished" if done == total else "stopped", done, total)
        run.log(f"wrote {run.adapter_path.name} after {done} steps")
        if request.signal is not None and done < total:
            raise Stopped(run.adapter_path, done, request.signal)
    return run.adapter_path


def _learn(
    plan: Plan,
    run: RunFolder,
    listen: Callable[[StepReport], None],
    stop: Callable[[], bool],
    resume: Snapshot | None,
) -> int:
    """Train in an open run folder, write the adapter, and return the steps done."""
    config = plan.config

    def after(report: StepReport) -> None:
        step = report.step
        run.write_metrics(**vars(report))
        if config.previews.every and step % config.previews.every == 0:
            _write_previews(plan, run, step)
        listen(report)

    def save(snapshot: Snapshot, last: bool) -> None:
        adapter = _adapter(plan, method, snapshot.step)
        run.save_checkpoint(adapter, snapshot, config.checkpoints.keep)
        run.write_status("running", snapshot.step, config.steps)
        if last:
            save_adapter(run.adapter_path, adapter)

    with _method(plan) as (method, data):
        return train_steps(plan.backbone, method, data, config, after, save, stop, resume)


def _follow(plan: Plan, run: RunFolder) -> Path:
    """Train beside the main process, which alone writes."""
    resume = run.newest_snapshot()
    with stop_on_signal() as request, _method(plan) as (method, data):
        train_steps(
            plan.backbone, method, data, plan.config, lambda _: None,
            stop=request.is_set, resume=resume,
        )  # fmt: skip
    return run.adapter_path


@contextmanager
def _method(plan: Plan) -> Iterator[tuple[Method, LatentSet]]:
    """The method in place in the backbone, and the encoded photos."""
    config, backbone = plan.config, plan.backbone
    side = config.resolution or backbone.resolution
    data = encode_photos(backbone, plan.folder.photos, side, config.flip, config.buckets)
    method = METHODS[config.method](backbone, config)
    try:
        yield method, data
    finally:
        method.remove()


def train(
    photos: str | Path,
    *,
    trigger: str,
    class_noun: str,
    base: str = "pocket",
    preset: str | None = None,
    out: str | Path | None = None,
    listen: Callable[[StepReport], None] = lambda report: None,
    override: bool = False,
    **settings: Any,
) -> Path:
    """Train a concept adapter from a photo folder and return its file's path.

    `settings` are those of `TrainConfig`: `steps=200, optim={"lr": 1e-3}`. The run folder `out`
    defaults to `runs/<name of the photo folder>`; a stopped run there goes on.
    """
    wanted = {"photos": str(photos), "trigger": trigger, "class_noun": class_noun, "base": base}
    plan = plan_training(configure(wanted | settings, preset))
    return run_training(plan, Path(out) if out else default_run(plan), listen, override)


def default_run(plan: Plan) -> Path:
    """The run folder of a plan: a stopped run that was begun alike, or the first free name.

    Names are runs/name, runs/name-2, … after the photo folder.
    """
    if process_count() > 1:
        raise ConfigError("several processes need one run folder: pass --out")
    name = Path(plan.config.photos).expanduser().resolve().name or "run"
    candidates = [Path("runs") / name, *(Path("runs") / f"{name}-{i}" for i in range(2, 10_000))]
    return next(path for path in candidates if not path.exists() or _goes_on(plan, path))


def _goes_on(plan: Plan, path: Path) -> bool:
    """Whether a run folder holds an unfinished run of this plan that nobody works on."""
    run = RunFolder(path)
    if run.state() == "finished" or run.in_use() or not (path / "inputs.json").exists():
        return False
    return not changes(run, plan.config, plan.inputs())


def open_base(base: str | None, infos: Sequence[AdapterInfo]) -> StableDiffusion:
    """The base model; it defaults to the one that the adapters were made for, else to `pocket`."""
    recorded = [info.base for info in infos if info.base]
    base = base or (recorded[0] if recorded else "pocket")
    if base in recorded and base != "pocket" and "/" not in base and not Path(base).exists():
        raise AdapterError(f"the adapter was made for '{base}': pass its path as --base.")
    return load_backbone(base)


def open_with_adapters(base: str | None, adapters: list[Chosen]) -> StableDiffusion:
    """The base model with the adapters attached."""
    backbone = open_base(base, [each.adapter.info for each in adapters])
    for index, chosen in enumerate(adapters):
        attach(backbone, chosen.adapter, ATTACHED.format(index), chosen.weight)
    return backbone


def generate(
    prompt: str,
    *,
    adapters: Sequence[str | Path] = (),
    regions: Sequence[str] = (),
    base: str | None = None,
    seed: int = 0,
    num: int = 1,
    steps: int = 25,
    guidance: float | None = None,
    negative: str = "",
    width: int | None = None,
    height: int | None = None,
    out: str | Path | None = None,
    listen: Callable[[int], None] = lambda done: None,
) -> list[Image]:
    """Pictures of a prompt, for the seeds `seed`, `seed + 1`, …; adapters are `FILE[:WEIGHT]`.

    `regions` are `x0,y0,x1,y1: prompt [:: negative [:: weights]]`, parts of the picture with
    prompts of their own. Pictures are made one at a time, so each depends on its own parameters
    alone. With `out`, a folder or for one picture a `.png`, they are written as PNGs that carry
    their parameters; `image.info["path"]` tells where.
    """
    chosen = choose_adapters(adapters)
    parts = [parse_region(text) for text in regions]
    attached = [
        Attached(ATTACHED.format(index), each.weight, triggers_of(each.adapter.info))
        for index, each in enumerate(chosen)
    ]
    adapter_weights(parts, prompt, [each.triggers for each in attached])  # complains early
    backbone = open_with_adapters(base, chosen)
    guidance = default_guidance(backbone) if guidance is None else guidance
    sampling = Sampling(negative, steps, guidance, *checked_size(backbone, width, height))
    target = None if out is None else output_target(Path(out), num)
    images = []
    for index in range(num):
        if parts:
            [image] = sample_regions(backbone, prompt, parts, [seed + index], sampling, attached)
        else:
            [image] = sample(backbone, [prompt], [seed + index], **vars(sampling))
        if target is not None:
            path = next_file(target) if target.is_dir() else target
            facts = parameters_of(backbone, prompt, seed + index, sampling, chosen, parts)
            save_png(image, path, facts)
            image.info["path"] = str(path)
        images.append(image)
        listen(index + 1)
    return images


def default_guidance(backbone: Backbone) -> float:
    """Guidance scale that suits a base: 3 for the pocket base, 7.5 for Stable Diffusion."""
    return 3.0 if backbone.name == "pocket" else 7.5


def inspect(path: str | Path) -> Adapter:
    """The checked content of an adapter file."""
    return load_adapter(Path(path).expanduser())
