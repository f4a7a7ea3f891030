"""The `rite` command. Everything heavy is imported inside the commands."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from rite_diffusion import cli_fusion
from rite_diffusion.cli_settings import settings_tree
from rite_diffusion.types import RiteError

app = typer.Typer(
    name="rite",
    help="Teach a text-to-image model your own concepts from a few photos.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


app.add_typer(cli_fusion.app)


def main() -> None:
    """Run a command; a RiteError becomes one line and exit code 2."""
    try:
        app()
    except RiteError as error:
        print(f"rite: {error}", file=sys.stderr)
        signal = getattr(error, "signal", None)
        sys.exit(2 if signal is None else 128 + signal)


def _version(wanted: bool) -> None:
    if wanted:
        from rite_diffusion import __version__

        print(f"rite_diffusion {__version__}")
        raise typer.Exit


@app.callback()
def rite(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Teach a text-to-image model your own concepts from a few photos."""


@app.command()
def train(
    photos: Annotated[Path, typer.Argument(help="Folder that holds the photos, or a .toml file.")],
    trigger: Annotated[
        str | None, typer.Option(help='New word for the concept, such as "<robot>".')
    ] = None,
    class_noun: Annotated[
        str | None, typer.Option("--class", help="What it is: robot, dog, cake.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="pocket, a diffusers folder, a .safetensors or a hub id.")
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="lora, pivotal, custom_diffusion or ed_lora.")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="Preset name or .toml file.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of the LoRA pairs.")] = None,
    optimizer: Annotated[
        str | None, typer.Option(help="adamw, adamw_plus, rite, scaled_adamw, scaled_sgd or sgd.")
    ] = None,
    lr: Annotated[str | None, typer.Option(help="Learning rate, or auto to try some out.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random.")] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; default: runs/<photos>.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Any setting: --set optim.warmup=20.")
    ] = None,
    override: Annotated[
        bool, typer.Option("--override", help="Go on with a stopped run though settings differ.")
    ] = False,
    sketch: Annotated[
        bool, typer.Option("--sketch", help="Leave statistics beside it, for fusing (rite sketch).")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Report, try a step, stop.")] = False,
) -> None:
    """Train a concept adapter from a folder of photos."""
    from rite_diffusion.config import merge, read_toml

    given = {
        "trigger": trigger,
        "class_noun": class_noun,
        "base": base,
        "method": method,
        "steps": steps,
        "lora.rank": rank,
        "optim.name": optimizer,
        "optim.lr": _number_or_word(lr),
        "seed": seed,
    }
    written = read_toml(photos) if photos.suffix == ".toml" else {"photos": str(photos)}
    settings = merge(written, settings_tree(given, set_ or []))
    from rite_diffusion import plan as planning
    from rite_diffusion import run
    from rite_diffusion.terminal import (
        describe_cost,
        describe_plan,
        describe_result,
        training_progress,
    )
    from rite_diffusion.training.processes import is_main_process

    plan = planning.survey(planning.configure(settings, preset))
    if not is_main_process():  # another process of this run writes and prints
        plan = planning.draw_class_pictures(plan)
        run.run_training(plan, out or run.default_run(plan))
        return
    describe_plan(plan)
    plan = planning.draw_class_pictures(plan, print)
    if dry_run:
        describe_cost(plan, run.measure(plan))
        return
    folder = out or run.default_run(plan)
    with training_progress(plan.config.steps) as listen:
        adapter = run.run_training(plan, folder, listen, override)
    describe_result(plan, adapter)
    if sketch:
        cli_fusion.sketch(adapter, base=plan.config.base)


def _number_or_word(text: str | None) -> float | str | None:
    """The number that an option's text says, else the text, which the settings will judge."""
    try:
        return None if text is None else float(text)
    except ValueError:
        return text


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help='What to draw: "a <robot> on a blue background".')],
    adapter: Annotated[
        list[str] | None, typer.Option(help="FILE or FILE:WEIGHT; may be given several times.")
    ] = None,
    region: Annotated[
        list[str] | None,
        typer.Option(
            help='Part with its own prompt: "x0,y0,x1,y1: prompt :: negative", or "at word: ...", '
            "where the picture would have that word."
        ),
    ] = None,
    combine: Annotated[
        str, typer.Option(help="How several adapters act together: sum, switch or composite.")
    ] = "sum",
    control: Annotated[
        list[str] | None,
        typer.Option(help="MODEL=PICTURE[:WEIGHT], a ControlNet or T2I-Adapter; repeatable."),
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Base model; default: the adapter's, else pocket.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the first picture.")] = 0,
    num: Annotated[int, typer.Option(min=1, max=10_000, help="How many pictures.")] = 1,
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Denoising steps.")] = 25,
    guidance: Annotated[
        float | None, typer.Option(min=0, max=100, help="Guidance scale; default: the base's.")
    ] = None,
    negative: Annotated[str, typer.Option(help="What to avoid.")] = "",
    width: Annotated[int | None, typer.Option(help="Pixels; default: the base's.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels; default: the base's.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the pictures, or one .png.")] = Path(
        "outputs"
    ),
    other_base: Annotated[
        bool, typer.Option("--other-base", help="Use adapters on a base they were not made for.")
    ] = False,
) -> None:
    """Make pictures of a prompt, with any number of adapters."""
    from rite_diffusion import recipes

    images = recipes.generate(
        prompt,
        adapters=adapter or [],
        regions=region or [],
        combine=combine,
        controls=control or [],
        base=base,
        seed=seed,
        num=num,
        steps=steps,
        guidance=guidance,
        negative=negative,
        width=width,
        height=height,
        out=out,
        other_base=other_base,
    )
    for image in images:
        print(image.info["path"])


@app.command()
def mask(
    photos: Annotated[Path, typer.Argument(help="Folder that holds the photos.")],
    class_noun: Annotated[str, typer.Option("--class", help="What they show: robot, dog, cake.")],
    base: Annotated[str, typer.Option(help="Base model whose attention is asked.")] = "pocket",
    model: Annotated[
        Path | None, typer.Option(help="A segmenter's .onnx file, to be asked instead of the base.")
    ] = None,
    override: Annotated[bool, typer.Option("--override", help="Replace masks.")] = False,
) -> None:
    """Write masks of the subject beside the photos, for `rite train` to look at."""
    from rite_diffusion.masking import make_masks

    report = make_masks(photos, class_noun, base=base, model=model, override=override)
    for path in report.written:
        print(path)
    for name, reason in report.left:
        print(f"left out    {name}: {reason}")


@app.command()
def inspect(file: Annotated[Path, typer.Argument(help="An adapter, .safetensors.")]) -> None:
    """Show what an adapter file holds and how it was trained."""
    from rite_diffusion import recipes
    from rite_diffusion.terminal import describe_adapter

    describe_adapter(file, recipes.inspect(file))


@app.command()
def convert(
    file: Annotated[Path, typer.Argument(help="An adapter: .safetensors or a PEFT folder.")],
    to: Annotated[str, typer.Option(help="kohya, diffusers, peft or comfyui.")],
    out: Annotated[Path | None, typer.Option(help="Default: FILE-<to> beside FILE.")] = None,
    base: Annotated[
        str | None, typer.Option(help="Its base model, to load the export in and draw with.")
    ] = None,
    published_pickle: Annotated[
        bool,
        typer.Option(
            "--published-pickle",
            help="FILE holds embeddings or a paper's weights as a pickle; nothing in it is run.",
        ),
    ] = False,
) -> None:
    """Write an adapter in another tool's dialect and prove it by loading it back."""
    from rite_diffusion.conversion import convert as converted
    from rite_diffusion.terminal import describe_export

    export = converted(file, to, out, base=base, published_pickle=published_pickle)
    describe_export(export)


@app.command()
def card(file: Annotated[Path, typer.Argument(help="An adapter, .safetensors.")]) -> None:
    """Write an adapter's model card, README.md, beside its file."""
    from rite_diffusion.publishing import write_card

    print(write_card(file))


@app.command()
def push(
    file: Annotated[Path, typer.Argument(help="An adapter, .safetensors.")],
    repository: Annotated[str, typer.Argument(help="OWNER/NAME on the hub.")],
    public: Annotated[bool, typer.Option("--public", help="Let everyone see it.")] = False,
) -> None:
    """Upload an adapter and its card to a hub repository, private unless asked."""
    from rite_diffusion.publishing import push as pushed

    print(pushed(file, repository, private=not public))


@app.command()
def doctor() -> None:
    """Show versions, devices and what is missing, with how to get it."""
    from rite_diffusion.doctor import examine
    from rite_diffusion.terminal import describe_findings

    describe_findings(examine())


@app.command()
def studio(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 7860,
    auth: Annotated[
        list[str] | None,
        typer.Option(envvar="RITE_AUTH", help="user:password; several times for several users."),
    ] = None,
    workspace: Annotated[
        Path, typer.Option(help="Folder for photos, runs, adapters and pictures.")
    ] = Path("studio"),
    share: Annotated[
        bool, typer.Option("--share", help="A public link through gradio.live; needs --auth.")
    ] = False,
    mcp: Annotated[
        bool, typer.Option("--mcp", help="Also serve as tools for assistants (MCP).")
    ] = False,
) -> None:
    """Open the web page: train, generate, fuse, compare, look after adapters."""
    from rite_diffusion.ui.serve import Settings, launch

    page = launch(Settings(workspace, host, port, tuple(auth or ()), share, mcp))
    print(f"studio      {page.local_url}")
    if page.share_url:
        print(f"public      {page.share_url}")
    print(f"workspace   {workspace.absolute()}")
    print("Ctrl-C ends the studio; trainings go on and are found again.", flush=True)
    page.block_thread()


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Run folder; default: runs/demo.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
) -> None:
    """Learn the example robot on the pocket base and show it before and after."""
    from rite_diffusion import demo as example
    from rite_diffusion.terminal import describe_demo, describe_plan, training_progress

    plan, folder = example.prepare(out, seed)
    describe_plan(plan)
    with training_progress(plan.config.steps) as listen:
        result = example.run(plan, folder, listen)
    describe_demo(result)
