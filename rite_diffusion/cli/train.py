"""`rite train`, `caption`, `mask` and `demo`. Heavy imports are inside the commands."""

from pathlib import Path
from typing import Annotated, Any

import typer

from rite_diffusion.cli import fusion as cli_fusion
from rite_diffusion.cli.settings import say, settings_tree
from rite_diffusion.files.writing import folder_output, user_path

OPTIMIZERS = (
    "adamw, adamw_plus, adamw_schedule_free, lora_muon, prodigy, rite, scaled_adamw, scaled_sgd or "
    "sgd."
)

app = typer.Typer()


@app.command()
def train(
    photos: Annotated[Path, typer.Argument(help="Folder that holds the photos, or a .toml file.")],
    trigger: Annotated[
        str | None, typer.Option(help='New word for the concept, such as "<robot>".')
    ] = None,
    class_noun: Annotated[
        str | None, typer.Option("--class", help="Class of the concept: robot, dog, cake.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="pocket, a hub id, a diffusers folder or a .safetensors.")
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="lora, pivotal, custom_diffusion or ed_lora.")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="Preset name or .toml file.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of the LoRA pairs.")] = None,
    init: Annotated[
        Path | None, typer.Option(help="Adapter file to start from; its rank applies.")
    ] = None,
    optimizer: Annotated[str | None, typer.Option(help=OPTIMIZERS)] = None,
    lr: Annotated[
        str | None, typer.Option(help="Learning rate, or auto to find one by short trials.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random.")] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; default: runs/<photos>.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Any setting: --set optim.warmup=20.")
    ] = None,
    override: Annotated[
        bool, typer.Option("--override", help="Resume a stopped run though settings differ.")
    ] = False,
    sketch: Annotated[
        bool, typer.Option("--sketch", help="Write a sketch beside the adapter, for fusing.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Report, measure a step, write nothing.")
    ] = False,
) -> None:
    """Train a concept adapter from a folder of photos."""
    given = {
        "trigger": trigger,
        "class_noun": class_noun,
        "base": base,
        "method": method,
        "steps": steps,
        "lora.rank": rank,
        "lora.init_from": str(init) if init else None,
        "optim.name": optimizer,
        "optim.lr": _number_or_word(lr),
        "seed": seed,
    }
    settings = _with_written(photos, settings_tree(given, set_ or []))
    adapter = _report_and_train(settings, preset, out and folder_output(out), override, dry_run)
    if sketch and adapter is not None:
        base = settings.get("base", "pocket")
        cli_fusion.sketch(adapter, base=base, overwrite=True, **settings.get("memory", {}))


def _with_written(photos: Path, options: dict[str, Any]) -> dict[str, Any]:
    """The settings of the options over those of a .toml file, or of a folder of photos."""
    from rite_diffusion.config import merge, read_toml

    photos = user_path(photos)
    written = read_toml(photos) if photos.suffix == ".toml" else {"photos": str(photos)}
    return merge(written, options)


def _report_and_train(
    settings: dict[str, Any],
    preset: str | None,
    folder: Path | None,
    override: bool,
    dry_run: bool,
) -> Path | None:
    """Print the plan, then train; the adapter's path, None where there is nothing more to do."""
    from rite_diffusion.cli import output
    from rite_diffusion.cli.memory import DryRunPrinter
    from rite_diffusion.training import run
    from rite_diffusion.training.plan import plan_training
    from rite_diffusion.training.processes import is_main_process
    from rite_diffusion.training.settings import configure

    config = configure(settings, preset)
    if not is_main_process():  # another process of this run writes and prints
        plan = plan_training(config)
        run.run_training(plan, folder or run.default_run(plan))
        return None
    if dry_run:
        plan = plan_training(config, DryRunPrinter())
        output.describe_cost(plan, run.measure(plan))
        return None
    plan = plan_training(config, output.PlanPrinter())
    folder = folder or run.default_run(plan)
    with output.training_progress(plan.config.steps) as on_step:
        adapter = run.run_training(plan, folder, on_step, override)
    output.describe_result(plan, adapter)
    return adapter


def _number_or_word(text: str | None) -> float | str | None:
    """The option's text as a number, else unchanged; the settings check it."""
    try:
        return None if text is None else float(text)
    except ValueError:
        return text


@app.command()
def caption(
    photos: Annotated[Path, typer.Argument(help="Folder that holds the photos.")],
    trigger: Annotated[str, typer.Option(help='The word for the concept, such as "<robot>".')],
    class_noun: Annotated[
        str, typer.Option("--class", help="Class of the concept: robot, dog, cake.")
    ],
    model: Annotated[
        str | None, typer.Option(help="An image-to-text model: a hub id or a local folder.")
    ] = None,
    base: Annotated[
        str, typer.Option(help="Base model that will be trained, for the captions' form.")
    ] = "pocket",
    style: Annotated[
        str | None, typer.Option(help="tags, phrase or sentences; default: the base's.")
    ] = None,
    name: Annotated[
        list[str] | None,
        typer.Option("--name", help="Another name that the model may use: puppy. Repeatable."),
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Leave existing captions.")] = False,
    override: Annotated[
        bool, typer.Option("--override", "--overwrite", help="Replace existing captions.")
    ] = False,
) -> None:
    """Write captions beside the photos: the trigger, and what is not the concept."""
    from typing import cast

    from rite_diffusion.api import caption as captions
    from rite_diffusion.backbones.families import CaptionStyle

    report = captions.caption(
        photos, trigger, class_noun, model=model, base=base,
        style=cast(CaptionStyle | None, style), names=name or (), keep=keep, override=override,
    )  # fmt: skip
    for path, text in report.written.items():
        say(f"{path.name}: {text}")
    for photo, reason in report.left:
        say(f"left out    {photo}: {reason}")
    for photo in report.unsure:
        say(f"unsure      {photo}: the model named no {class_noun}; check its caption")


@app.command()
def mask(
    photos: Annotated[Path, typer.Argument(help="Folder that holds the photos.")],
    class_noun: Annotated[
        str, typer.Option("--class", help="Class of the subject: robot, dog, cake.")
    ],
    base: Annotated[
        str, typer.Option(help="Base model whose attention finds the subject.")
    ] = "pocket",
    model: Annotated[
        Path | None, typer.Option(help="A segmenter's .onnx file, to use instead of the base.")
    ] = None,
    override: Annotated[
        bool, typer.Option("--override", "--overwrite", help="Replace existing masks.")
    ] = False,
) -> None:
    """Write masks of the subject beside the photos; `rite train` uses them."""
    from rite_diffusion.api.masks import make_masks

    report = make_masks(photos, class_noun, base=base, model=model, override=override)
    for path in report.written:
        say(path)
    for name, reason in report.left:
        say(f"left out    {name}: {reason}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Run folder; default: runs/demo.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
) -> None:
    """Train the example robot on the pocket base and draw it before and after."""
    from rite_diffusion.api import demo as example
    from rite_diffusion.cli import output

    plan, folder = example.prepare(out, seed, output.PlanPrinter())
    with output.training_progress(plan.config.steps) as on_step:
        result = example.run(plan, folder, on_step)
    output.describe_demo(result)
