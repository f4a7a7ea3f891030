"""`rite inspect`, `convert`, `card` and `push`. Heavy imports are inside the commands."""

from pathlib import Path
from typing import Annotated

import typer

from rite_diffusion.cli.settings import say
from rite_diffusion.files.writing import user_path

app = typer.Typer()


@app.command()
def inspect(file: Annotated[Path, typer.Argument(help="An adapter, .safetensors.")]) -> None:
    """Show what an adapter file holds and how it was trained."""
    from rite_diffusion.api.inspect import inspect as inspected
    from rite_diffusion.cli.output import describe_adapter

    path = user_path(file)
    describe_adapter(path, inspected(path))


@app.command()
def convert(
    file: Annotated[Path, typer.Argument(help="An adapter: .safetensors or a PEFT folder.")],
    to: Annotated[str, typer.Option(help="kohya, diffusers, peft or comfyui.")],
    out: Annotated[Path | None, typer.Option(help="Default: FILE-<to> beside FILE.")] = None,
    base: Annotated[
        str | None, typer.Option(help="Its base model, to check the export with.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="fp32, fp16 or bf16; default: the file's.")
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help="Largest rank of a module; larger ones are cut.")
    ] = None,
    published_pickle: Annotated[
        bool,
        typer.Option(
            "--published-pickle",
            help="FILE holds embeddings or a paper's weights as a pickle; nothing in it is run.",
        ),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace existing files that --out does not name.")
    ] = False,
    allow_loss: Annotated[
        bool, typer.Option("--allow-loss", help="Accept a relative error above 1 %.")
    ] = False,
) -> None:
    """Write an adapter in another tool's dialect and check it by loading it."""
    from rite_diffusion.api.convert import convert as converted
    from rite_diffusion.cli.output import describe_export

    describe_export(
        converted(
            file,
            to,
            out,
            base=base,
            dtype=dtype,
            rank=rank,
            published_pickle=published_pickle,
            overwrite=overwrite,
            allow_loss=allow_loss,
        )  # fmt: skip
    )


@app.command()
def card(
    file: Annotated[Path, typer.Argument(help="An adapter, .safetensors.")],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing README.md.")
    ] = False,
) -> None:
    """Write an adapter's model card, README.md, beside its file."""
    from rite_diffusion.api.publish import write_card

    say(write_card(file, overwrite=overwrite))


@app.command()
def push(
    file: Annotated[Path, typer.Argument(help="An adapter, .safetensors.")],
    repository: Annotated[str, typer.Argument(help="OWNER/NAME on the hub.")],
    public: Annotated[bool, typer.Option("--public", help="Make the repository public.")] = False,
) -> None:
    """Upload an adapter and its card to a hub repository, private unless asked."""
    from rite_diffusion.api.publish import push as pushed

    say(pushed(file, repository, private=not public))
