"""`rite generate` and `rite grid`. Heavy imports are inside the commands."""

from pathlib import Path
from typing import Annotated

import typer

from rite_diffusion.cli.settings import EncoderWeights, Offload, Weights, memory_table, say
from rite_diffusion.files.writing import check_outputs

app = typer.Typer()

OtherBase = Annotated[
    bool, typer.Option("--other-base", help="Use adapters on a base they were not made for.")
]


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help='What to draw: "a <robot> on a blue background".')],
    adapter: Annotated[
        list[str] | None, typer.Option(help="FILE or FILE:WEIGHT; may be given several times.")
    ] = None,
    region: Annotated[
        list[str] | None,
        typer.Option(
            help='Box with its own prompt: "x0,y0,x1,y1: prompt :: negative", or "at word: ...", '
            "the box where the plain picture shows that word."
        ),
    ] = None,
    region_by: Annotated[
        str | None,
        typer.Option(help="Draw regions by attention or by predictions; default: the base's."),
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
    steps: Annotated[
        int | None, typer.Option(min=1, max=1000, help="Denoising steps; default: the base's.")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(min=0, max=100, help="Guidance scale; default: the base's.")
    ] = None,
    negative: Annotated[str, typer.Option(help="What to avoid.")] = "",
    width: Annotated[int | None, typer.Option(help="Pixels; default: the base's.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels; default: the base's.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the pictures, or one .png.")] = Path(
        "outputs"
    ),
    other_base: OtherBase = False,
    weights: Weights = "full",
    encoder_weights: EncoderWeights = "full",
    offload: Offload = "none",
) -> None:
    """Draw pictures of a prompt, with any number of adapters."""
    from rite_diffusion.api.generate import draw
    from rite_diffusion.generation.request import PictureRequest

    request = PictureRequest(
        prompt=prompt, negative=negative, seed=seed, steps=steps, guidance=guidance, width=width,
        height=height, regions=region or [], region_by=region_by, combine=combine,
        controls=control or [],
    )  # fmt: skip
    images = draw(
        request, adapter or [], base=base, num=num, out=out, other_base=other_base,
        memory=memory_table(weights, encoder_weights, offload),
    )  # fmt: skip
    for image in images:
        say(image.info["path"])


@app.command()
def grid(
    prompt: Annotated[list[str], typer.Option(help="What to draw; may be given several times.")],
    adapter: Annotated[
        list[str] | None, typer.Option(help='FILE[:WEIGHT], or several joined by +; "": none.')
    ] = None,
    weight: Annotated[
        list[float] | None, typer.Option(help="Factor on the adapters' weights; default: 1.")
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(help="attached, switch, composite or a method of `rite fuse`."),
    ] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Default: 0.")] = None,
    columns: Annotated[
        str, typer.Option(help="Axis of the columns: prompt, adapter, weight, method or seed.")
    ] = "seed",
    base: Annotated[str | None, typer.Option(help="Base model; default: the adapters'.")] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, max=1000, help="Denoising steps; default: the base's.")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(min=0, max=100, help="Guidance scale; default: the base's.")
    ] = None,
    negative: Annotated[str, typer.Option(help="What to avoid.")] = "",
    other_base: OtherBase = False,
    cell: Annotated[int, typer.Option(min=32, max=1024, help="Pixels of a picture's side.")] = 192,
    out: Annotated[Path | None, typer.Option(help="The sheet; default: grid.png.")] = None,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace an existing grid.png that --out does not name."),
    ] = False,
) -> None:
    """Draw a sheet over prompts, adapters, weights, methods and seeds; each may be repeated."""
    from rite_diffusion.api import sheet as sheets
    from rite_diffusion.cli.output import picture_progress

    target = out or Path("grid.png")
    if out is None:
        check_outputs(derived=[target], overwrite=overwrite)
    with picture_progress() as progress:
        image = sheets.grid(
            prompt,
            adapters=adapter or [""],
            weights=weight or [1.0],
            methods=method or [sheets.ATTACHED],
            seeds=seed or [0],
            columns=columns,
            base=base,
            steps=steps,
            guidance=guidance,
            negative=negative,
            cell=cell,
            out=target,
            other_base=other_base,
            progress=progress,
        )
    say(image.info["path"])
