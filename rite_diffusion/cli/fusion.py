"""`rite fuse` and `rite sketch`. Heavy imports are inside the commands."""

from pathlib import Path
from typing import Annotated

import typer

from rite_diffusion.cli.settings import (
    EncoderWeights,
    Offload,
    Weights,
    memory_table,
    say,
    settings_tree,
)

app = typer.Typer()


@app.command()
def fuse(
    adapters: Annotated[list[str], typer.Argument(help="Adapters: FILE or FILE:WEIGHT each.")],
    method: Annotated[
        str, typer.Option(help="gram, weighted, concat, svd, ties, dare, knots, … (docs/fusion.md)")
    ] = "gram",
    out: Annotated[
        Path | None, typer.Option(help="The fused adapter; default: fused.safetensors.")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Largest rank of a layer.")] = None,
    refine: Annotated[
        int,
        typer.Option(
            min=0, max=10, help="Times to solve again, on inputs that the fused adapter gives."
        ),
    ] = 0,
    report: Annotated[
        bool, typer.Option("--report", help="Show conflicts; write .report.json and .report.png.")
    ] = False,
    base: Annotated[str | None, typer.Option(help="Base model; default: the adapters'.")] = None,
    steps: Annotated[
        int, typer.Option(min=1, max=1000, help="Denoising steps of pictures for statistics.")
    ] = 20,
    seed: Annotated[int, typer.Option(help="Seed of pictures for statistics.")] = 0,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="A method's setting: --set preserve=0.5.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace existing files that --out does not name.")
    ] = False,
    allow_loss: Annotated[
        bool, typer.Option("--allow-loss", help="Accept a rank that loses more than 1 %.")
    ] = False,
) -> None:
    """Fuse several adapters into one."""
    from rite_diffusion.api import fuse as merging
    from rite_diffusion.cli.output import describe_conflicts, describe_fused, picture_progress
    from rite_diffusion.fusion.statistics import Drawing

    settings = settings_tree({"rank": rank, "refine": refine or None}, set_ or [])
    drawing = Drawing(steps=steps, seed=seed)
    settings |= {"method": method, "out": out, "base": base, "drawing": drawing}
    settings |= {"overwrite": overwrite, "allow_loss": allow_loss}
    with picture_progress("statistics") as progress:
        if not report:
            describe_fused(merging.fuse(adapters, progress=progress, **settings))
            return
        describe_conflicts(merging.fuse_and_report(adapters, progress=progress, **settings))


@app.command()
def sketch(
    adapter: Annotated[Path, typer.Argument(help="An adapter, .safetensors.")],
    prompt: Annotated[
        list[str] | None, typer.Option(help="What to draw; default: prompts with its trigger.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Default: FILE.sketch.safetensors.")] = None,
    base: Annotated[str | None, typer.Option(help="Base model; default: the adapter's.")] = None,
    directions: Annotated[
        int, typer.Option(help="Directions kept per layer; more make a larger file.")
    ] = 64,
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Denoising steps.")] = 20,
    seed: Annotated[int, typer.Option(help="Seed of the first picture.")] = 0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing file of the default name.")
    ] = False,
    weights: Weights = "full",
    encoder_weights: EncoderWeights = "full",
    offload: Offload = "none",
) -> None:
    """Write an adapter's statistics beside it, so that others fuse it without drawing."""
    from rite_diffusion.api import sketch as sketching
    from rite_diffusion.cli.output import picture_progress
    from rite_diffusion.fusion.statistics import Drawing

    with picture_progress("statistics") as progress:
        path = sketching.sketch(
            adapter,
            out=out,
            base=base,
            prompts=prompt or [],
            directions=directions,
            drawing=Drawing(steps=steps, seed=seed),
            overwrite=overwrite,
            memory=memory_table(weights, encoder_weights, offload),
            progress=progress,
        )
    say(f"{path} ({path.stat().st_size / 1e6:.2f} MB)")
